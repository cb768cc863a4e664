"""The keys of an RWKV-7 checkpoint as other formats spell them: the same, but for a prefix."""

from typing import Any

from .keys import LOW_RANK, RWKV7Config

HF_PREFIX = "model."
PREFIXES = (HF_PREFIX, "rwkv7.", "_orig_mod.", "module.")  # what trainers and converters put before official keys


def to_hf(key: str) -> str:
    """blocks.0.att.key.weight -> model.blocks.0.att.key.weight; head.weight stays."""
    return key if key.startswith("head.") else HF_PREFIX + key


def from_hf(key: str) -> str:
    """The inverse of to_hf; a key that is official already stays as it is."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def to_web(key: str) -> str:
    """web-rwkv and Ai00 spell keys in lower case, as official files do."""
    return key.lower()


def swapped_in_web(key: str) -> bool:
    """True if web-rwkv keeps the last two dimensions of this tensor the other way round."""
    return key.rpartition(".")[2] in LOW_RANK


def hf_settings(config: RWKV7Config) -> dict[str, Any]:
    """config.json of a folder with the layout of the Hugging Face RWKV-7 models."""
    return {
        "architectures": ["Rwkv7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "context_length": 1 << 20,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "intermediate_size": config.dim_ffn,
        "head_size": config.head_size,
        "num_attention_heads": config.n_head,
        "layer_norm_epsilon": 1e-5,
        "group_norm_epsilon": 64e-5,
        "embedding_layer_norm_fused": False,
        "wkv_state_dtype": "float32",
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.iclr_rank,
        "v_low_rank_dim": config.value_rank,
        "gate_low_rank_dim": config.gate_rank,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
