"""Rename the tensors of a BONE adapter folder of peft to those of a MISS one, or back.

MiSS is Bone's later name in peft, with the same tensors and arithmetic under other keys. The adapter may be of any
model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..checkpoints.peft_folder import read_config, read_folder_tensors, replacing
from ..checkpoints.tensors import save_safetensors
from ..cli.errors import UserError

OTHER = MappingProxyType({"BONE": "MISS", "MISS": "BONE"})


def rename_folder(source: Path, target: Path) -> str:
    """Write a BONE folder as a MISS folder, or a MISS one as a BONE one; return a line about it. Raises UserError for
    an adapter of another kind, and for bat-in, which MiSS lacks."""
    config = read_config(source)
    kind = str(config.get("peft_type"))
    if kind not in OTHER:
        raise UserError(
            f"{source} holds a {kind} adapter, and only BONE and MISS ones become a folder; name a .pth "
            "(RWKV-PEFT) or a .safetensors for one of an RWKV model"
        )
    if kind == "BONE" and config.get("init_weights") == "bat-in":
        raise UserError(
            f"{source} is a bat-in adapter, and MiSS has only bone, bat-out and mini; merge it instead "
            "(merge_and_unload)"
        )
    tensors = read_folder_tensors(source)
    dims = {tensor.dim() for key, tensor in tensors.items() if key.endswith("_block")}
    if config.get("init_weights") is True and dims == {3}:
        config["init_weights"] = "bat"  # a pre-release of peft wrote true for it
    if kind == "MISS" and config.get("init_weights") != "mini":
        config.pop("mini_r", None)
    config, tensors = (renamed(settings, kind.lower(), OTHER[kind].lower()) for settings in (config, tensors))
    with replacing(target) as (settings, weights):
        save_safetensors(weights, tensors)
        settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return f"{target}: {OTHER[kind]} of {kind}, {len(tensors)} tensors; Hugging Face peft loads it"


def renamed(settings: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Change the method's name in the keys of settings or tensors, and in the values of peft_type and bias."""
    result = {}
    for key, value in settings.items():
        if key == "peft_type":
            value = new.upper()
        elif key == "bias" and str(value).lower() == f"{old}_only":
            value = {"miss": "MiSS_only"}.get(new, f"{new}_only")
        elif key.endswith(f".{old}_block") or key == f"{old}_dropout":
            key = key.replace(f"{old}_", f"{new}_")
        result[key] = value
    return result
