"""The keys of an RWKV-7 checkpoint, their shapes, and the dimensions read from them.

Low-rank widths follow no one formula over the model sizes, so that they are always read from the file. Layer 0 never
uses its value residual (v0, v1, v2), and only some files have it: it stays as in the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...cli.errors import UserError
from ...cli.names import STATE
from ...config import ModelConfig
from ..layout import TIME_STATE, LayerState, check_head_size, count_layers, is_time_state, two_axes

if TYPE_CHECKING:
    from torch import Tensor

SIGN = "blocks.0.att.r_k"
TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
PARTS = ("time", "ln", "emb", "head")  # the mixes' own parameters; ln0, ln1, ln2, ln_x, ln_out; emb; head
SHIFTS = "rwkvag"  # the results of token shift, in the order in which they are stacked
LOW_RANK = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
TIME = (*(f"x_{name}" for name in SHIFTS), "w0", "a0", "v0", *LOW_RANK, "k_k", "k_a", "r_k")
NORMS = ("ln0", "ln1", "ln2", "ln_x", "ln_out")
# (a part of the keys of another architecture, its name)
VARIANTS = (("ffn.enn", "an RWKV-8 preview"), (".rosa", "an RWKV-8 preview with ROSA"))


@dataclass(frozen=True)
class RWKV7Config(ModelConfig):
    """Dimensions of an RWKV-7 (x070) model: the widths of the low-rank projections of decay (w), in-context learning
    rate (a), value residual (v) and gate (g); first_value is True if layer 0 has the value residual that it does not
    use."""

    decay_rank: int = 64
    iclr_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    first_value: bool = True

    version = "x070"
    layer_state: ClassVar[Any] = LayerState


def dimensions(tensors: "Mapping[str, Tensor]") -> RWKV7Config:
    """RWKV7Config of {key: tensor}; see Family.dimensions."""
    other = next((name for part, name in VARIANTS if any(part in key for key in tensors)), None)
    if other is not None:
        raise ValueError(f"it is {other}, which this tool does not compute; take a model of the plain architecture")
    embedding, bonus = two_axes(tensors, SIGN)
    n_layer = count_layers(tensors)
    layer = 1 if n_layer > 1 else 0  # in layer 0 some files have no value residual
    return RWKV7Config(
        n_layer=n_layer,
        n_embd=embedding[1],
        vocab_size=embedding[0],
        dim_att=bonus[0] * bonus[1],
        dim_ffn=tensors["blocks.0.ffn.key.weight"].shape[0],
        head_size=bonus[1],
        decay_rank=tensors["blocks.0.att.w1"].shape[1],
        iclr_rank=tensors["blocks.0.att.a1"].shape[1],
        value_rank=tensors[f"blocks.{layer}.att.v1"].shape[1] if n_layer > 1 or _has_first_value(tensors) else 32,
        gate_rank=tensors["blocks.0.att.g1"].shape[1],
        first_value=_has_first_value(tensors),
    )


def _has_first_value(tensors: "Mapping[str, Tensor]") -> bool:
    return "blocks.0.att.v0" in tensors


def new_dimensions(
    n_layer: int, n_embd: int, vocab_size: int, dim_att: int = 0, dim_ffn: int = 0, head_size: int = 0
) -> RWKV7Config:
    """RWKV7Config of a new model, with the widths of RWKV-LM's train_temp (RWKV-v7); see Family.new_dimensions."""
    head_size = head_size or 64
    if dim_att not in (0, n_embd):
        raise UserError(
            f"--dim_att {dim_att}: RWKV-7 has as many attention channels as channels, {n_embd}; leave it out"
        )
    check_head_size(head_size, n_embd)
    return RWKV7Config(
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        dim_att=n_embd,
        dim_ffn=dim_ffn or 4 * n_embd,
        head_size=head_size,
        decay_rank=_width(2.5, n_embd),
        iclr_rank=_width(2.5, n_embd),
        value_rank=_width(1.7, n_embd),
        gate_rank=_width(5.0, n_embd),
    )


def _width(factor: float, n_embd: int) -> int:
    """A low-rank width: factor times the square root of n_embd, rounded to a multiple of 32."""
    return max(32, round(factor * n_embd**0.5 / 32) * 32)


def shapes(config: RWKV7Config) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint with its shape, in RWKV-LM's order. Released models have another order, and a merged
    model keeps its base's."""
    C, F, H, N = config.n_embd, config.dim_ffn, config.n_head, config.head_size
    ranks = {"w": config.decay_rank, "a": config.iclr_rank, "v": config.value_rank}
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (config.vocab_size, C)}
    for i in range(config.n_layer):
        for norm in ("ln1", "ln2") + (("ln0",) if i == 0 else ()):
            shapes |= {f"blocks.{i}.{norm}.weight": (C,), f"blocks.{i}.{norm}.bias": (C,)}
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        shapes |= {f"{att}x_{name}": (1, 1, C) for name in SHIFTS}
        for name, rank in ranks.items():
            if name == "v" and i == 0 and not config.first_value:
                continue
            shapes |= {f"{att}{name}1": (C, rank), f"{att}{name}2": (rank, C), f"{att}{name}0": (1, 1, C)}
        shapes |= {
            f"{att}g1": (C, config.gate_rank),
            f"{att}g2": (config.gate_rank, C),
            f"{att}k_k": (1, 1, C),
            f"{att}k_a": (1, 1, C),
            f"{att}r_k": (H, N),
            f"{att}receptance.weight": (C, C),
            f"{att}key.weight": (C, C),
            f"{att}value.weight": (C, C),
            f"{att}output.weight": (C, C),
            f"{att}ln_x.weight": (C,),
            f"{att}ln_x.bias": (C,),
            f"{ffn}x_k": (1, 1, C),
            f"{ffn}key.weight": (F, C),
            f"{ffn}value.weight": (C, F),
        }
    return shapes | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (config.vocab_size, C)}


def part_of(key: str) -> str | None:
    """The member of PARTS that a parameter belongs to, STATE for a time state, or None."""
    if is_time_state(key):
        return STATE
    components = key.split(".")
    if components[-1] in TIME:
        return "time"
    if any(name in NORMS for name in components):
        return "ln"
    return next((part for part in ("emb", "head") if part in components), None)


def learning_rate(key: str) -> tuple[float, bool]:
    """RWKV-LM's rule: w0 learns at twice the rate; the mixes' own parameters (TIME) and time states do not decay."""
    leaf = key.rpartition(".")[2]
    return 2.0 if leaf == "w0" else 1.0, leaf not in (*TIME, TIME_STATE)
