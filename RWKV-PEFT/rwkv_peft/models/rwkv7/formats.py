"""An RWKV-7 checkpoint's keys and tensors as other formats have them.

transformers (its pull request #47787, src/transformers/models/rwkv7, and RWKV's folders of August 2026): the official
keys behind `rwkv7.`, and head.weight. Layer 0 has a value residual that nothing computes: zeros stand in for one that
the file lacks. Other folders have `model.` or no prefix.

llama.cpp (architecture rwkv7): low-rank factors are transposed, the six token-shift amounts stacked, the other vectors
flat. llama.cpp wants a value residual in layer 0 too, though that layer uses none, as wide as the in-context learning
rate's: copies of the latter stand in, even if the file has a value residual there.

flash-linear-attention (fla/models/rwkv7), the layout of folders on Hugging Face: low-rank factors are linear layers,
and so transposed, with w0, a0 and v0 as their biases; vectors are flat but for the token shift's; layer 0 has no value
residual. Older folders have the six token-shift amounts of a layer in one tensor of six rows.

transformers-rwkv (github.com/rwkv-rs, temp/rwkv_pth2st.py; model_type rwkv): layers named as in Qwen, low-rank factors
as in official files, vectors flat, layer 0 without the value residual. It is read and not written.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cli.errors import UserError, short
from ..family import GgufTensor, differences
from ..gguf import GgufTensors, all_settings, flat
from .keys import LOW_RANK, SHIFTS, RWKV7Config

HF_PREFIX = "rwkv7."
PREFIXES = ("model.", HF_PREFIX, "_orig_mod.", "module.")  # what trainers and converters put before official keys


# (setting of config.json, the value that it must have, and has by default)
HF_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("architecture_version", "rwkv7"),
    ("norm_eps", 1e-5),
    ("layer_norm_epsilon", 1e-5),
    ("group_norm_epsilon", 64e-5),
    ("norm_bias", True),
    ("tie_word_embeddings", False),
    ("embedding_layer_norm_fused", False),
    ("use_deep_embed", False),
)
FIRST_VALUE = ("att.v0", "att.v1", "att.v2")
HEAD_SIZE = 64  # the eps of the norm after the recurrence is head size x norm_eps elsewhere: RWKV-7's only at this size


def check_settings(due: Iterable[tuple[str, Any]], settings: Mapping[str, Any], name: str | Path) -> None:
    """Raise UserError for a setting of config.json with another value than the due one."""
    for setting, wanted in due:
        if (value := settings.get(setting, wanted)) != wanted:
            raise UserError(
                f"{name}/config.json: {setting} is {short(str(value))}, and it is {wanted} in RWKV-7; take a model "
                "that is RWKV-7"
            )


def to_hf(key: str) -> str:
    """blocks.0.att.key.weight -> rwkv7.blocks.0.att.key.weight; head.weight stays."""
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


def hf_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """See Family.hf_tensors."""
    written = {to_hf(key): tensor for key, tensor in tensors.items()}
    if "blocks.1.att.v0" in tensors:
        for leaf in FIRST_VALUE:
            written.setdefault(to_hf(f"blocks.0.{leaf}"), torch.zeros_like(tensors[f"blocks.1.{leaf}"]))
    return written


def from_hf_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str | Path) -> dict[str, Tensor]:
    """See Family.from_hf_tensors."""
    check_settings(HF_SETTINGS, settings, name)
    head_size = settings.get("head_dim", HEAD_SIZE)
    if head_size != HEAD_SIZE and "group_norm_epsilon" not in settings:
        raise UserError(
            f"{name}/config.json: head_dim is {short(str(head_size))}, and heads of {HEAD_SIZE} are due: transformers' "
            "eps of the norm after the recurrence depends on the head size, and in RWKV-7 it does not"
        )
    official = {from_hf(key): tensor for key, tensor in tensors.items()}
    first = [f"blocks.0.{leaf}" for leaf in FIRST_VALUE]
    if all(key in official and not official[key].any() for key in first):
        return {key: tensor for key, tensor in official.items() if key not in first}
    return official


def hf_settings(config: RWKV7Config) -> dict[str, Any]:
    """config.json for transformers' RWKV-7; head size x norm_eps is its eps of the norm after the recurrence, and
    group_norm_epsilon, which it does not read, that of RWKV-7."""
    return {
        "architectures": ["Rwkv7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": 1 << 20,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "intermediate_size": config.dim_ffn,
        "head_dim": config.head_size,
        "num_heads": config.n_head,
        "norm_eps": 1e-5,
        "norm_bias": True,
        "group_norm_epsilon": 64e-5,
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
QWEN_SIGN = ".linear_attn.x_"
# (a pattern in a key there, what official keys have in its place)
QWEN_NAMES = (
    (r"^model\.embed_tokens\.", "emb."),
    (r"^model\.embedding_norm\.", "blocks.0.ln0."),
    (r"^model\.norm\.", "ln_out."),
    (r"^lm_head\.", "head."),
    (r"^model\.layers\.", "blocks."),
    (r"\.input_layernorm\.", ".ln1."),
    (r"\.post_attention_layernorm\.", ".ln2."),
    (r"\.linear_attn\.", ".att."),
    (r"\.mlp\.", ".ffn."),
    (r"\.r_proj\.", ".receptance."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.o_proj\.", ".output."),
    (r"\.g_norm\.", ".ln_x."),
)
SETTINGS: tuple[tuple[str, Any], ...] = (
    ("hidden_act", "sqrelu"),
    ("norm_eps", 1e-5),
    ("tie_word_embeddings", False),
    ("attn", None),
)


def from_layers(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str | Path
) -> dict[str, Tensor] | None:
    """See Family.from_layers."""
    if any(QWEN_SIGN in key for key in tensors):
        return from_qwen_names(tensors, settings, name)
    if not any(map(SIGN.match, tensors)):
        return None
    check_settings(SETTINGS, settings, name)
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


def from_qwen_names(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str | Path) -> dict[str, Tensor]:
    """from_layers for transformers-rwkv."""
    check_settings(HF_SETTINGS, settings, name)
    official = {}
    for key, tensor in tensors.items():
        for there, here in QWEN_NAMES:
            key = re.sub(there, here, key)
        flat = tensor.ndim == 1 and not key.endswith((".weight", ".bias"))
        official[key] = tensor[None, None] if flat else tensor
    return official


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
    names = dict(OUTSIDE)
    for i in range(len(layers)):
        there = f"model.layers.{i}."
        value = i > 0 or any(key.startswith(f"{there}attn.v_lora.") for key in keys)
        names |= {f"{there}{key}": f"blocks.{i}.{official}" for key, official in _block(i == 0, value).items()}
    return names


def _block(first: bool, value: bool) -> dict[str, str]:
    """_names of one block, without its prefix; first: it has ln0; value: it has the value residual."""
    norms = NORMS + ((("pre_norm", "ln0"),) if first else ())
    names = {f"{key}.{kind}": f"{official}.{kind}" for key, official in norms for kind in ("weight", "bias")}
    names |= {f"{key}.weight": f"{official}.weight" for key, official in MATRICES}
    names |= {f"attn.{leaf}": f"att.{leaf}" for leaf in (*(f"x_{shift}" for shift in SHIFTS), "k_k", "k_a", "r_k")}
    for letter in "wavg" if value else "wag":
        factors = f"attn.{letter}_lora.lora."
        names |= {f"{factors}0.weight": f"att.{letter}1", f"{factors}2.weight": f"att.{letter}2"}
        names |= {f"{factors}2.bias": f"att.{letter}0"} if letter != "g" else {}
    return names | {"ffn.x_k": "ffn.x_k"}


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
