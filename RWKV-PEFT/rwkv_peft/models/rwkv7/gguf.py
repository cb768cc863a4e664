"""RWKV-7 as llama.cpp has it (architecture rwkv7).

Low-rank factors are transposed, the six token-shift amounts stacked, the other vectors flat. llama.cpp wants a value
residual in layer 0 too, though that layer uses none, as wide as the in-context learning rate's: copies of the latter
stand in, even if the file has a value residual there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..family import GgufTensor
from ..gguf import CONTEXT, GgufTensors, flat
from .keys import SHIFTS, RWKV7Config


def gguf_tensors(base: Mapping[str, Tensor], config: RWKV7Config) -> Iterator[GgufTensor]:
    """See Family.gguf_tensors."""
    told = GgufTensors(base)
    entry = told.entry
    yield from told.embedding()
    for i in range(config.n_layer):
        att, ffn, block = f"blocks.{i}.att.", f"blocks.{i}.ffn.", f"blk.{i}."
        yield from told.norms(i)
        yield told.stacked(f"{block}time_mix_lerp_fused.weight", [f"{att}x_{name}" for name in SHIFTS])
        for name in "wav":
            source = "a" if i == 0 and name == "v" else name
            yield entry(f"{block}time_mix_{name}0.weight", f"{att}{source}0", flat)
            yield entry(f"{block}time_mix_{name}1.weight", f"{att}{source}1", torch.t)
            yield entry(f"{block}time_mix_{name}2.weight", f"{att}{source}2", torch.t)
        for name in ("g1", "g2"):
            yield entry(f"{block}time_mix_{name}.weight", f"{att}{name}", torch.t)
        for name in ("k_k", "k_a", "r_k"):
            yield entry(f"{block}time_mix_{name}.weight", f"{att}{name}", flat)
        for name in ("receptance", "key", "value", "output"):
            yield entry(f"{block}time_mix_{name}.weight", f"{att}{name}.weight", large=True)
        yield entry(f"{block}channel_mix_lerp_k.weight", f"{ffn}x_k")
        for name in ("key", "value"):
            yield entry(f"{block}channel_mix_{name}.weight", f"{ffn}{name}.weight", large=True)
    yield from told.head()


def gguf_settings(config: RWKV7Config) -> tuple[tuple[str, Any], ...]:
    """See Family.gguf_settings."""
    return (
        ("add_context_length", CONTEXT),
        ("add_embedding_length", config.n_embd),
        ("add_block_count", config.n_layer),
        ("add_layer_norm_eps", 1e-5),
        ("add_wkv_head_size", config.head_size),
        ("add_decay_lora_rank", config.decay_rank),
        ("add_iclr_lora_rank", config.iclr_rank),
        ("add_value_residual_mix_lora_rank", config.value_rank),
        ("add_gate_lora_rank", config.gate_rank),
        ("add_feed_forward_length", config.dim_ffn),
        ("add_head_count", 0),  # there are no attention heads
    )
