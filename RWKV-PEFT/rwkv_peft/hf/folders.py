"""Conversion of peft's adapter folders from BONE to MISS and back.

MiSS is Bone's later name in peft, with the same tensors and arithmetic under other keys.

    rwkv-peft bone2miss IN OUT      writes a MISS folder from a BONE one, or a BONE folder from a MISS one
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files.adapter_folder import read_config, read_folder_tensors, replacing
from ..files.pth_writer import TensorSpec
from ..files.safetensors_file import write_safetensors
from ..release.flags import bone2miss_flags


def bone_to_miss(source: str | Path, target: str | Path) -> None:
    """Write the BONE folder `source` as a MISS folder `target`. Raises UserError for bat-in, which MiSS lacks."""
    config, tensors = read(source, "BONE")
    if config.get("init_weights") == "bat-in":
        raise UserError(
            f"{source} is a bat-in adapter, and MiSS has bone, bat-out and mini alone; merge it instead "
            "(merge_and_unload)"
        )
    write(target, rename(config, "bone", "miss"), rename(tensors, "bone", "miss"))


def miss_to_bone(source: str | Path, target: str | Path) -> None:
    """Write the MISS folder `source` as a BONE folder `target`."""
    config, tensors = read(source, "MISS")
    if config.get("init_weights") != "mini":
        config.pop("mini_r", None)
    write(target, rename(config, "miss", "bone"), rename(tensors, "miss", "bone"))


def read(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read an adapter folder -> (config, tensors). Raises UserError if it is not of this kind."""
    config = read_config(folder)
    if config.get("peft_type") != kind:
        raise UserError(f"{folder} holds a {config.get('peft_type')} adapter, and {kind} is due here")
    tensors = read_folder_tensors(Path(folder))
    dims = {tensor.dim() for key, tensor in tensors.items() if key.endswith("_block")}
    if config.get("init_weights") is True and dims == {3}:
        config["init_weights"] = "bat"  # a pre-release of peft wrote true for it
    return config, tensors


def rename(settings: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Change the method's name in the keys of settings or tensors, and in the values of peft_type and bias."""
    renamed = {}
    for key, value in settings.items():
        if key == "peft_type":
            value = new.upper()
        elif key == "bias" and str(value).lower() == f"{old}_only":
            value = {"miss": "MiSS_only"}.get(new, f"{new}_only")
        elif key.endswith(f".{old}_block") or key == f"{old}_dropout":
            key = key.replace(f"{old}_", f"{new}_")
        renamed[key] = value
    return renamed


def write(folder: str | Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter folder; its two files get their names only when both are written."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and an adapter is a folder; name another")
    with replacing(folder) as (settings, weights):
        write_safetensors(weights, {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}, tensors.items())
        settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def main(argv: list[str]) -> int:
    """Convert a folder to the other kind; -> 0."""
    args = bone2miss_flags(argv)
    kind = read_config(args.source).get("peft_type")
    (miss_to_bone if kind == "MISS" else bone_to_miss)(args.source, args.target)
    print(f"{args.source} ({kind}) -> {args.target} ({'BONE' if kind == 'MISS' else 'MISS'})")
    return 0
