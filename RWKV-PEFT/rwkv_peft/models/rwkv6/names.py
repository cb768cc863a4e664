"""The keys of an RWKV-6 checkpoint as other formats spell them."""

import re
from typing import Any

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
