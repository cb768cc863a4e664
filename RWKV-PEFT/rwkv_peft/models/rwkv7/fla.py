"""RWKV-7 in the layout of flash-linear-attention, which folders of it on Hugging Face have.

The layout is that of the state dict of fla/models/rwkv7 there: low-rank factors are linear layers, and so transposed,
with w0, a0 and v0 as their biases; vectors are flat but for the token shift's; layer 0 has no value residual. Older
folders have the six token-shift amounts of a layer in one tensor of six rows.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...cli.errors import UserError, short
from ..family import differences
from .keys import LOW_RANK, SHIFTS, RWKV7Config

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
