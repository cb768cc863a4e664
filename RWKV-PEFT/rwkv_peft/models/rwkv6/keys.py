"""The keys of an RWKV-6 checkpoint, their shapes in official order, and the dimensions read from them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...cli.names import STATE
from ...config import ModelConfig
from ..layout import LayerState, check_head_size, count_layers, is_time_state, two_axes

if TYPE_CHECKING:
    from torch import Tensor

SIGN = "blocks.0.att.time_maa_w1"
TARGETS = ("att.receptance", "att.key", "att.value", "att.gate", "att.output", "ffn.key", "ffn.receptance", "ffn.value")
PARTS = ("time", "ln", "emb", "head")  # time_*; ln0, ln1, ln2, ln_x, ln_out; emb; head


@dataclass(frozen=True)
class RWKV6Config(ModelConfig):
    """Dimensions of an RWKV-6 (x060) model: maa_rank and decay_rank are the widths of the low-rank token-shift and
    decay projections (32 and 64, or 64 and 128 at C = 4096); ln_x has the epsilon 1e-5 head_size_divisor²."""

    maa_rank: int = 32
    decay_rank: int = 64
    head_size_divisor: int = 8

    version, layer_state = "x060", LayerState


def dimensions(tensors: "Mapping[str, Tensor]") -> RWKV6Config:
    """RWKV6Config of {key: tensor}; see Family.dimensions."""
    embedding, bonus = two_axes(tensors, "blocks.0.att.time_faaaa")
    config = RWKV6Config(
        n_layer=count_layers(tensors),
        n_embd=embedding[1],
        vocab_size=embedding[0],
        dim_att=tensors["blocks.0.att.receptance.weight"].shape[0],
        dim_ffn=tensors["blocks.0.ffn.key.weight"].shape[0],
        head_size=bonus[1],
        maa_rank=tensors["blocks.0.att.time_maa_w2"].shape[1],
        decay_rank=tensors["blocks.0.att.time_decay_w1"].shape[1],
    )
    if 0 in (config.n_head, config.dim_ffn, config.maa_rank, config.decay_rank):
        raise ValueError(
            f"none of its widths may be 0, and they are {config.dim_att} attention channels in heads of "
            f"{config.head_size}, {config.dim_ffn} feed-forward channels, and {config.maa_rank} and "
            f"{config.decay_rank} of the low-rank projections"
        )
    return config


def new_dimensions(
    n_layer: int, n_embd: int, vocab_size: int, dim_att: int = 0, dim_ffn: int = 0, head_size: int = 0
) -> RWKV6Config:
    """RWKV6Config of a new model; 0 stands for upstream's default. See Family.new_dimensions."""
    dim_att, head_size = dim_att or n_embd, head_size or 64
    check_head_size(head_size, dim_att, "attention channels")
    wide = n_embd >= 4096
    return RWKV6Config(
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        dim_att=dim_att,
        dim_ffn=dim_ffn or max(32, int(n_embd * 3.5) // 32 * 32),
        head_size=head_size,
        maa_rank=64 if wide else 32,
        decay_rank=128 if wide else 64,
    )


def shapes(config: RWKV6Config) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint, in the order of official files, with its shape."""
    C, A, F, H, N = config.n_embd, config.dim_att, config.dim_ffn, config.n_head, config.head_size
    m, d = config.maa_rank, config.decay_rank
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (config.vocab_size, C)}
    for i in range(config.n_layer):
        for norm in ("ln1", "ln2") + (("ln0",) if i == 0 else ()):
            shapes |= {f"blocks.{i}.{norm}.weight": (C,), f"blocks.{i}.{norm}.bias": (C,)}
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        shapes |= {f"{att}time_maa_{x}": (1, 1, C) for x in "xwkvrg"}
        shapes |= {
            f"{att}time_maa_w1": (C, 5 * m),
            f"{att}time_maa_w2": (5, m, C),
            f"{att}time_decay": (1, 1, A),
            f"{att}time_decay_w1": (C, d),
            f"{att}time_decay_w2": (d, A),
            f"{att}time_faaaa": (H, N),
            f"{att}receptance.weight": (A, C),
            f"{att}key.weight": (A, C),
            f"{att}value.weight": (A, C),
            f"{att}output.weight": (C, A),
            f"{att}gate.weight": (A, C),
            f"{att}ln_x.weight": (A,),
            f"{att}ln_x.bias": (A,),
            f"{ffn}time_maa_k": (1, 1, C),
            f"{ffn}time_maa_r": (1, 1, C),
            f"{ffn}key.weight": (F, C),
            f"{ffn}receptance.weight": (C, C),
            f"{ffn}value.weight": (C, F),
        }
    return shapes | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (config.vocab_size, C)}


def part_of(key: str) -> str | None:
    """The member of PARTS that a parameter belongs to, STATE for a time state, or None."""
    if is_time_state(key):
        return STATE
    components = key.split(".")
    return next((part for part in PARTS if any(re.fullmatch(rf"{part}(\d+|_\w+)?", name) for name in components)), None)


def learning_rate(key: str) -> tuple[float, bool]:
    """RWKV-LM's rule: time_decay learns at twice the rate, and no parameter named time_* has weight decay."""
    leaf = key.rpartition(".")[2]
    return 2.0 if leaf == "time_decay" else 1.0, not leaf.startswith("time_")
