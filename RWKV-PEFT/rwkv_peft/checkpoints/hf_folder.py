"""Reads models in folders of Hugging Face: safetensors files, in one or many, beside a config.json."""

from pathlib import Path

import torch

from ..cli.errors import UserError
from ..models import FAMILIES, official_tensors
from .readable import choice_in, read_settings
from .tensors import read_safetensors


def read_hf_model(path: Path) -> dict[str, torch.Tensor]:
    """Read a folder in the layout of a generation's Hugging Face model, of flash-linear-attention or of
    transformers-rwkv -> {official key: tensor}. Raises UserError for a folder without .safetensors or config.json, or
    with files of two models."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{path} is a folder without .safetensors files, and so no Hugging Face model"
            + (choice_in(path, ".pth", ".st", ".gguf") or "; name a file")
        )
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json, which is written last: its conversion or download was interrupted, and its "
            "files may be of two models; make it again"
        )
    held: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = read_safetensors(file)[0]
        if twice := sorted(held.keys() & tensors.keys()):
            raise UserError(
                f"{path}: {file.name} and another of its .safetensors files both hold {twice[0]}, so that they are of "
                "two models; remove those of one"
            )
        held |= tensors
    settings = read_settings(path / "config.json")
    for family in FAMILIES:
        if (official := family.from_layers(held, settings, path)) is not None:
            return official
    family, official = official_tensors(held, lambda family: family.from_hf)
    return family.from_hf_tensors(official, settings, path)
