"""RWKV-6 as llama.cpp has it (architecture rwkv6).

The low-rank factors are transposed, the five token-shift lerps stacked, and the other time vectors flat.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..family import GgufTensor
from ..gguf import CONTEXT, GgufTensors, flat
from .keys import RWKV6Config

LERPS = "wkvrg"  # the order in which llama.cpp stacks time_maa_*
MATRICES = ("receptance", "key", "value", "gate", "output")  # of time-mix; channel-mix has three of these names


def gguf_tensors(base: Mapping[str, Tensor], config: RWKV6Config) -> Iterator[GgufTensor]:
    """See Family.gguf_tensors."""
    told = GgufTensors(base)
    entry = told.entry
    yield from told.embedding()
    for i in range(config.n_layer):
        att, ffn, block = f"blocks.{i}.att.", f"blocks.{i}.ffn.", f"blk.{i}."
        yield from told.norms(i)
        yield entry(f"{block}time_mix_lerp_x.weight", f"{att}time_maa_x")
        yield told.stacked(f"{block}time_mix_lerp_fused.weight", [f"{att}time_maa_{letter}" for letter in LERPS])
        yield entry(f"{block}time_mix_w1.weight", f"{att}time_maa_w1", torch.t)
        yield entry(f"{block}time_mix_w2.weight", f"{att}time_maa_w2", lambda tensor: tensor.permute(0, 2, 1))
        yield entry(f"{block}time_mix_first.weight", f"{att}time_faaaa")
        yield entry(f"{block}time_mix_decay.weight", f"{att}time_decay", flat)
        yield entry(f"{block}time_mix_decay_w1.weight", f"{att}time_decay_w1", torch.t)
        yield entry(f"{block}time_mix_decay_w2.weight", f"{att}time_decay_w2", torch.t)
        for name in MATRICES:
            yield entry(f"{block}time_mix_{name}.weight", f"{att}{name}.weight", large=True)
        for letter in "kr":
            yield entry(f"{block}channel_mix_lerp_{letter}.weight", f"{ffn}time_maa_{letter}")
        for name in ("key", "receptance", "value"):
            yield entry(f"{block}channel_mix_{name}.weight", f"{ffn}{name}.weight", large=True)
    yield from told.head()


def gguf_settings(config: RWKV6Config) -> tuple[tuple[str, float], ...]:
    """See Family.gguf_settings."""
    return (
        ("add_context_length", CONTEXT),
        ("add_embedding_length", config.n_embd),
        ("add_block_count", config.n_layer),
        ("add_layer_norm_eps", 1e-5),
        ("add_rescale_every_n_layers", 0),  # rescaling halves weights to suit float16 activations; 0 is exact
        ("add_wkv_head_size", config.head_size),
        ("add_time_mix_extra_dim", config.maa_rank),
        ("add_time_decay_extra_dim", config.decay_rank),
        ("add_feed_forward_length", config.dim_ffn),
        ("add_head_count", 0),  # there are no attention heads
    )
