"""The keys of an RWKV-7b checkpoint: RWKV-7a's, and those of each layer's attention; and the state of a layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..layout import LayerState
from ..rwkv7a import keys
from ..rwkv7a.keys import RWKV7aConfig

if TYPE_CHECKING:
    from torch import Tensor

SIGN = "blocks.0.qkv.qq.weight"
TIME = ("k1", "k2", "x_q")  # of the attention; its v1, v2, x_k and x_v have names of RWKV-7's TIME
NORMS = ("lnq", "lnk", "lnv")
TABLES = ("k_emb", "k_emb_x", "v_emb", "v_emb_x")  # what makes a token's factors
TARGETS, PARTS = (*keys.TARGETS, "qkv.qq"), keys.PARTS
EMBEDDINGS = (*keys.EMBEDDINGS, "qkv.k_emb.weight", "qkv.v_emb.weight")  # ends of the keys of its Tables (parts.py)


class DeepState(NamedTuple):
    """The state of one layer of RWKV-7b between two calls: LayerState's fields, and the attention's.

    q_shift, k_shift (B, D), v_shift (B, C): the last query, key and value before the token shift; past_keys (B, P, D)
    and past_values (B, P, C): those that tokens attend to; length (B,) int64: how many of them a sequence has, the last
    ones.
    """

    att_shift: "Tensor"
    wkv: "Tensor"
    ffn_shift: "Tensor"
    q_shift: "Tensor"
    k_shift: "Tensor"
    v_shift: "Tensor"
    past_keys: "Tensor"
    past_values: "Tensor"
    length: "Tensor"

    @staticmethod
    def keys() -> tuple[str, ...]:
        """See LayerState."""
        fields = ("q_shift", "k_shift", "v_shift", "past_keys", "past_values")
        return *LayerState.keys(), *(f"qkv.{name}" for name in fields)

    @staticmethod
    def shapes(config: "RWKV7bConfig") -> tuple[tuple[int, ...], ...]:
        """See LayerState."""
        C, D = config.n_embd, config.attention_size
        return *LayerState.shapes(config), (D,), (D,), (C,), (0, D), (0, C), ()


@dataclass(frozen=True)
class RWKV7bConfig(RWKV7aConfig):
    """Dimensions of an RWKV-7b (x070b) model: the widths of the attention's queries and keys and of the low-rank
    projections to its keys and values; shift_axes is the number of axes that its token shift's vectors have in files.
    """

    attention_size: int = 256
    attention_key_rank: int = 32
    attention_value_rank: int = 32
    shift_axes: int = 3

    version = "x070b"
    layer_state = DeepState


def dimensions(tensors: "Mapping[str, Tensor]") -> RWKV7bConfig:
    """RWKV7bConfig of {key: tensor}; see Family.dimensions."""
    sizes = {name: tensors[f"blocks.0.qkv.{name}"].shape for name in ("qq.weight", "k1", "v1", "x_q")}
    return RWKV7bConfig(
        **asdict(keys.dimensions(tensors)),
        attention_size=sizes["qq.weight"][0],
        attention_key_rank=sizes["k1"][1],
        attention_value_rank=sizes["v1"][1],
        shift_axes=len(sizes["x_q"]),
    )


def new_dimensions(
    n_layer: int, n_embd: int, vocab_size: int, dim_att: int = 0, dim_ffn: int = 0, head_size: int = 0
) -> RWKV7bConfig:
    """RWKV7bConfig of a new model, with the attention's widths of the released one; see Family.new_dimensions."""
    return RWKV7bConfig(**asdict(keys.new_dimensions(n_layer, n_embd, vocab_size, dim_att, dim_ffn, head_size)))


def shapes(config: RWKV7bConfig) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint with its shape: a block's own behind those of RWKV-7a."""
    C, D, V = config.n_embd, config.attention_size, config.vocab_size
    K, U, ones = config.attention_key_rank, config.attention_value_rank, (1,) * (config.shift_axes - 1)
    attention = {"qq.weight": (D, C), "k1": (C, K), "k2": (K, D), "v1": (C, U), "v2": (U, C)}
    attention |= {"k_emb.weight": (V, D), "k_emb_x.weight": (D, C), "v_emb.weight": (V, C), "v_emb_x.weight": (C, C)}
    vectors = {"q": D, "k": D, "v": C}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in keys.shapes(config).items():
        shapes[key] = shape
        if key.endswith(".ffn.s_emb_x.weight"):
            qkv = key.removesuffix("ffn.s_emb_x.weight") + "qkv."
            shapes |= {f"{qkv}{name}": entry for name, entry in attention.items()}
            for name, size in vectors.items():
                shapes |= {f"{qkv}x_{name}": (*ones, size)}
                shapes |= {f"{qkv}ln{name}.weight": (size,), f"{qkv}ln{name}.bias": (size,)}
    return shapes


def part_of(key: str) -> str | None:
    """As RWKV-7a's part_of: what makes a token's factors of key and value belongs to "emb"."""
    components = key.split(".")
    if components[-1] in TIME:
        return "time"
    if any(name in NORMS for name in components):
        return "ln"
    return "emb" if any(name in TABLES for name in components) else keys.part_of(key)


def learning_rate(key: str) -> tuple[float, bool]:
    """RWKV-7a's rule; the attention's own parameters have no weight decay."""
    factor, decays = keys.learning_rate(key)
    return factor, decays and key.rpartition(".")[2] not in TIME
