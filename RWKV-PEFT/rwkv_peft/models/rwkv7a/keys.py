"""The keys of an RWKV-7a checkpoint: RWKV-7's, and the deep embeddings of each feed-forward."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..rwkv7 import keys
from ..rwkv7.keys import RWKV7Config

if TYPE_CHECKING:
    from torch import Tensor

SIGN = "blocks.0.ffn.s_emb.weight"
GATE = ("s0", "s1", "s2")  # of the feed-forward's mix, as RWKV-7's TIME are
TABLES = ("s_emb", "s_emb_x")  # what makes a token's matrix
TARGETS, PARTS = keys.TARGETS, keys.PARTS
EMBEDDINGS = ("ffn.s_emb.weight",)  # ends of the keys of its Tables (parts.py)


@dataclass(frozen=True)
class RWKV7aConfig(RWKV7Config):
    """Dimensions of an RWKV-7a (x070a) model; in each layer a token has a matrix of deep_size x deep_size
    numbers."""

    deep_size: int = 32

    version = "x070a"


def dimensions(tensors: "Mapping[str, Tensor]") -> RWKV7aConfig:
    """RWKV7aConfig of {key: tensor}; see Family.dimensions."""
    return RWKV7aConfig(**asdict(keys.dimensions(tensors)), deep_size=tensors["blocks.0.ffn.s1"].shape[1])


def new_dimensions(
    n_layer: int, n_embd: int, vocab_size: int, dim_att: int = 0, dim_ffn: int = 0, head_size: int = 0
) -> RWKV7aConfig:
    """RWKV7aConfig of a new model, with the matrices' size of released ones; see Family.new_dimensions."""
    return RWKV7aConfig(**asdict(keys.new_dimensions(n_layer, n_embd, vocab_size, dim_att, dim_ffn, head_size)))


def shapes(config: RWKV7aConfig) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint with its shape: a block's own behind those of RWKV-7."""
    C, F, D = config.n_embd, config.dim_ffn, config.deep_size
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in keys.shapes(config).items():
        shapes[key] = shape
        if key.endswith(".ffn.value.weight"):
            ffn = key.removesuffix("value.weight")
            shapes |= {f"{ffn}s1": (C, D), f"{ffn}s2": (D, F), f"{ffn}s0": (1, 1, F)}
            shapes |= {f"{ffn}s_emb.weight": (config.vocab_size, D * D), f"{ffn}s_emb_x.weight": (D * D, C)}
    return shapes


def part_of(key: str) -> str | None:
    """As RWKV-7's part_of: the gate belongs to "time", what makes a token's matrix to "emb"."""
    components = key.split(".")
    if components[-1] in GATE:
        return "time"
    return "emb" if any(name in TABLES for name in components) else keys.part_of(key)


def learning_rate(key: str) -> tuple[float, bool]:
    """RWKV-7's rule; the gate has no weight decay."""
    factor, decays = keys.learning_rate(key)
    return factor, decays and key.rpartition(".")[2] not in GATE
