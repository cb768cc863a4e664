"""An RWKV-6 checkpoint's keys and tensors as other formats have them.

llama.cpp (architecture rwkv6): the low-rank factors are transposed, the five token-shift lerps stacked, and the other
time vectors flat.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..family import GgufTensor
from ..gguf import GgufTensors, all_settings, flat
from .keys import RWKV6Config

HF_PREFIX = "rwkv."
HF_RENAMES = (("emb.", "embeddings."), (".ln0.", ".pre_ln."), (".att.", ".attention."), (".ffn.", ".feed_forward."))
WEB_RENAMES = (("time_faaaa", "time_first"), ("time_maa", "time_mix"))


def to_hf(key: str) -> str:
    """blocks.0.att.key.weight -> rwkv.blocks.0.attention.key.weight; head.weight stays."""
    if key.startswith("head."):
        return key
    for official, other in HF_RENAMES:
        key = key.replace(official, other)
    return HF_PREFIX + key


def from_hf(key: str) -> str:
    """The inverse of to_hf; a key that is official already stays as it is."""
    key = key.removeprefix(HF_PREFIX)
    for official, other in HF_RENAMES:
        key = key.replace(other, official)
    return key


def to_web(key: str) -> str:
    """blocks.0.att.time_faaaa -> blocks.0.att.time_first, time_maa_x -> time_mix_x, lower case (web-rwkv, Ai00)."""
    for official, other in WEB_RENAMES:
        key = key.replace(official, other)
    return key.lower()


def from_web(key: str) -> str:
    """The inverse of to_web."""
    for official, other in WEB_RENAMES:
        key = re.sub(rf"\b{other}(?=_|$)", official, key)
    return key


def swapped_in_web(key: str) -> bool:
    """True if web-rwkv keeps the last two dimensions of this (official) tensor the other way round."""
    return key.endswith(("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"))


def hf_settings(config: RWKV6Config) -> dict[str, Any]:
    """config.json of a folder with the layout of the Hugging Face RWKV-6 models."""
    return {
        "architectures": ["Rwkv6ForCausalLM"],
        "model_type": "rwkv6",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "attention_hidden_size": config.dim_att,
        "num_hidden_layers": config.n_layer,
        "head_size": config.head_size,
        "head_size_divisor": config.head_size_divisor,
        "intermediate_size": config.dim_ffn,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 0,
        "time_mix_extra_dim": config.maa_rank,
        "time_decay_extra_dim": config.decay_rank,
        "lora_rank_tokenshift": config.maa_rank,
        "lora_rank_decay": config.decay_rank,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


LERPS = "wkvrg"  # the order in which llama.cpp stacks time_maa_*
MATRICES = ("receptance", "key", "value", "gate", "output")  # of time-mix; channel-mix has three of these names


def gguf_tensors(base: Mapping[str, Tensor], config: RWKV6Config) -> Iterator[GgufTensor]:
    """See Family.gguf_tensors."""
    described = GgufTensors(base)
    entry = described.entry
    yield from described.embedding()
    for i in range(config.n_layer):
        att, ffn, block = f"blocks.{i}.att.", f"blocks.{i}.ffn.", f"blk.{i}."
        yield from described.norms(i)
        yield entry(f"{block}time_mix_lerp_x.weight", f"{att}time_maa_x")
        yield described.stacked(f"{block}time_mix_lerp_fused.weight", [f"{att}time_maa_{letter}" for letter in LERPS])
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
    yield from described.head()


def gguf_settings(config: RWKV6Config) -> tuple[tuple[str, float], ...]:
    """See Family.gguf_settings."""
    return all_settings(
        config,
        ("add_rescale_every_n_layers", 0),  # rescaling halves weights to suit float16 activations; 0 is exact
        ("add_wkv_head_size", config.head_size),
        ("add_time_mix_extra_dim", config.maa_rank),
        ("add_time_decay_extra_dim", config.decay_rank),
    )
