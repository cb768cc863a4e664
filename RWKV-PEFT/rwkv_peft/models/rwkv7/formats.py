"""An RWKV-7 checkpoint's keys and tensors as other formats have them; Hugging Face's keys only lack a prefix.

llama.cpp (architecture rwkv7): low-rank factors are transposed, the six token-shift amounts stacked, the other vectors
flat. llama.cpp wants a value residual in layer 0 too, though that layer uses none, as wide as the in-context learning
rate's: copies of the latter stand in, even if the file has a value residual there.

flash-linear-attention (fla/models/rwkv7), the layout of folders on Hugging Face: low-rank factors are linear layers,
and so transposed, with w0, a0 and v0 as their biases; vectors are flat but for the token shift's; layer 0 has no value
residual. Older folders have the six token-shift amounts of a layer in one tensor of six rows.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cli.errors import UserError, short
from ..family import GgufTensor, differences
from ..gguf import GgufTensors, all_settings, flat
from .keys import LOW_RANK, SHIFTS, RWKV7Config

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


def gguf_tensors(base: Mapping[str, Tensor], config: RWKV7Config) -> Iterator[GgufTensor]:
    """See Family.gguf_tensors."""
    described = GgufTensors(base)
    entry = described.entry
    yield from described.embedding()
    for i in range(config.n_layer):
        att, ffn, block = f"blocks.{i}.att.", f"blocks.{i}.ffn.", f"blk.{i}."
        yield from described.norms(i)
        yield described.stacked(f"{block}time_mix_lerp_fused.weight", [f"{att}x_{name}" for name in SHIFTS])
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
    yield from described.head()


def gguf_settings(config: RWKV7Config) -> tuple[tuple[str, float], ...]:
    """See Family.gguf_settings."""
    return all_settings(
        config,
        ("add_wkv_head_size", config.head_size),
        ("add_decay_lora_rank", config.decay_rank),
        ("add_iclr_lora_rank", config.iclr_rank),
        ("add_value_residual_mix_lora_rank", config.value_rank),
        ("add_gate_lora_rank", config.gate_rank),
    )


LAYER = re.compile(r"model\.layers\.([0-9]+)\.")
SIGN = re.compile(r"model\.layers\.[0-9]+\.attn\.[wavg]_lora\.lora\.")
STACKED = ".attn.x_x"
HEAD_SIZE = 64  # the eps of the norm after the recurrence is head size x norm_eps there: RWKV-7's only at this size
# (key there, or its start, the official one)
OUTSIDE = (
    ("model.embeddings.weight", "emb.weight"),
    ("model.norm.weight", "ln_out.weight"),
    ("model.norm.bias", "ln_out.bias"),
    ("lm_head.weight", "head.weight"),
)
NORMS = (("attn_norm", "ln1"), ("ffn_norm", "ln2"), ("attn.g_norm", "att.ln_x"))
MATRICES = (
    ("attn.r_proj", "att.receptance"),
    ("attn.k_proj", "att.key"),
    ("attn.v_proj", "att.value"),
    ("attn.o_proj", "att.output"),
    ("ffn.key", "ffn.key"),
    ("ffn.value", "ffn.value"),
)
# (setting of config.json, the value that it must have, and has by default)
SETTINGS: tuple[tuple[str, Any], ...] = (
    ("hidden_act", "sqrelu"),
    ("norm_eps", 1e-5),
    ("tie_word_embeddings", False),
    ("attn", None),
)


def from_fla(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str | Path) -> dict[str, Tensor] | None:
    """See Family.from_fla."""
    if not any(map(SIGN.match, tensors)):
        return None
    for setting, due in SETTINGS:
        if (value := settings.get(setting, due)) != due:
            raise UserError(
                f"{name}/config.json: {setting} is {short(str(value))}, and it is {due} in RWKV-7; take a model that "
                "is RWKV-7"
            )
    tensors = _unstacked(tensors)
    official = _names(tensors)
    if wrong := differences(official, tensors):
        raise UserError(
            f"{name} is not a complete RWKV-7 in the layout of flash-linear-attention: {wrong}; take the folder as its "
            "release or training wrote it"
        )
    for key, tensor in tensors.items():
        if key.endswith(".attn.r_k") and tensor.shape[-1:] != (HEAD_SIZE,):
            raise UserError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, and heads of {HEAD_SIZE} are due: in this layout the "
                "eps of the norm after the recurrence depends on the head size, and in RWKV-7 it does not"
            )
    return {official[key]: _official(official[key], tensor) for key, tensor in tensors.items()}


def to_fla(base: Mapping[str, Tensor], config: RWKV7Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """See Family.to_fla."""
    if config.head_size != HEAD_SIZE:
        raise UserError(
            f"the model has heads of {config.head_size}, and flash-linear-attention computes RWKV-7 only with heads of "
            f"{HEAD_SIZE}; take another format"
        )
    names = _names([f"model.layers.{i}." for i in range(config.n_layer)])
    return {key: _foreign(key, official, base[official]) for key, official in names.items()}, dict(SETTINGS) | {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "intermediate_size": config.dim_ffn,
        "hidden_ratio": config.dim_ffn / config.n_embd,
        "head_dim": config.head_size,
        "num_heads": config.n_head,
        "value_dim": [config.dim_att] * config.n_layer,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.iclr_rank,
        "v_low_rank_dim": config.value_rank,
        "gate_low_rank_dim": config.gate_rank,
        "attn_mode": "chunk",
        "norm_first": True,
        "norm_bias": True,
        "fuse_norm": False,
        "use_cache": True,
    }


def _unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split each tensor of six token-shift amounts, as older folders have it, into six tensors."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        each = [f"{key.removesuffix('x')}{shift}" for shift in SHIFTS] if key.endswith(STACKED) else []
        stands_for_them = each and not any(map(tensors.__contains__, each)) and tensor.shape[:1] == (len(SHIFTS),)
        found |= dict(zip(each, tensor, strict=True)) if stands_for_them else {key: tensor}
    return found


def _names(keys: Collection[str]) -> dict[str, str]:
    """{key there: official key} of a whole model, of as many layers as the keys there name."""
    layers = {match[1] for match in map(LAYER.match, keys) if match}
    found = dict(OUTSIDE)
    for i in range(len(layers)):
        there = f"model.layers.{i}."
        value = i > 0 or any(key.startswith(f"{there}attn.v_lora.") for key in keys)
        found |= {f"{there}{key}": f"blocks.{i}.{official}" for key, official in _block(i == 0, value).items()}
    return found


def _block(first: bool, value: bool) -> dict[str, str]:
    """_names of one block, without its prefix; first: it has ln0; value: it has the value residual."""
    norms = NORMS + ((("pre_norm", "ln0"),) if first else ())
    found = {f"{key}.{kind}": f"{official}.{kind}" for key, official in norms for kind in ("weight", "bias")}
    found |= {f"{key}.weight": f"{official}.weight" for key, official in MATRICES}
    found |= {f"attn.{leaf}": f"att.{leaf}" for leaf in (*(f"x_{shift}" for shift in SHIFTS), "k_k", "k_a", "r_k")}
    for letter in "wavg" if value else "wag":
        factors = f"attn.{letter}_lora.lora."
        found |= {f"{factors}0.weight": f"att.{letter}1", f"{factors}2.weight": f"att.{letter}2"}
        found |= {f"{factors}2.bias": f"att.{letter}0"} if letter != "g" else {}
    return found | {"ffn.x_k": "ffn.x_k"}


def _official(key: str, tensor: Tensor) -> Tensor:
    """A view of a tensor from there in the shape of its official key: factors (D, C) -> (C, D) or back, vectors (C,) ->
    (1, 1, C). Norms stay as they are, and so do tensors with an unexpected number of axes."""
    if key.rpartition(".")[2] in LOW_RANK:
        return tensor.mT if tensor.ndim == 2 else tensor
    flat = tensor.ndim == 1 and not key.endswith((".weight", ".bias"))
    return tensor[None, None] if flat else tensor


def _foreign(key: str, official: str, tensor: Tensor) -> Tensor:
    """The inverse of _official; key is the tensor's there."""
    if official.rpartition(".")[2] in LOW_RANK:
        return tensor.mT
    return tensor if ".attn.x_" in key else tensor.flatten() if tensor.ndim == 3 else tensor
