"""Adapters of random values for the tests of merging, and the commands run on them."""

from pathlib import Path

import torch

from rwkv_peft.adapters.methods import METHODS, is_saved
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata
from rwkv_peft.checkpoints.base import fingerprint, open_base
from rwkv_peft.config import AdapterConfig
from rwkv_peft.release import convert as convert_cli
from rwkv_peft.release import merge_command as merge_cli

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = tuple(name for name in METHODS if is_saved(name))
TARGETS = ("att.key", "att.output", "ffn.key", "ffn.value")
RANK = 8


def params_of(variant, weight, rank=RANK, std=0.05, seed=0):
    """Random tensors of one adapted layer; constants that follow from its weight keep their values."""
    method, generator = METHODS[variant], torch.Generator().manual_seed(seed)
    config = AdapterConfig(rank=rank, mini_rank=4)
    shapes = method.tensors.shapes(config, *weight.shape)
    params = {
        name: std * torch.randn(shapes[name], generator=generator) for name in (*method.parameters, *method.constants)
    }
    told = {} if method.held is None or method.residual else method.held.make(weight, config, None)
    return params | told


def adapter_of(variant, base, targets=TARGETS, seed=0, **changes):
    """{key: tensor} and metadata of a random adapter on a base."""
    ends = tuple(f"{target}.weight" for target in targets)
    modules = [key.removesuffix(".weight") for key in base if key.endswith(ends)]
    tensors = {
        f"{module}.{name}": tensor
        for number, module in enumerate(modules)
        for name, tensor in params_of(variant, base[f"{module}.weight"], seed=seed + number).items()
    }
    values = {"rank": RANK, "scale": 0.5 if METHODS[variant].alpha else 1.0, "base_fingerprint": fingerprint(base)}
    return tensors, AdapterMetadata(variant, **values | changes)


def run(folder, *flags, adapter="a.safetensors", output="merged.pth"):
    """Run merge_bone.py's main inside the folder; returns the merged state dict."""
    argv = ("--base_model", folder / "base.pth", "--bone_checkpoint", folder / adapter, "--output", folder / output)
    assert merge_cli.main([str(word) for word in (*argv, *flags)]) == 0
    return open_base(folder / output).tensors


def convert(*words):
    assert convert_cli.main([str(word) for word in words]) == 0


def same(left, right):
    """True if two {key: tensor} have the same keys in one order, and equal tensors of the same dtypes."""
    return list(left) == list(right) and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )
