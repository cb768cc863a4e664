"""Calls cpu/mix, which is built on first use, through its structures."""

import ctypes
from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..native.arguments import fields, fill
from ..native.cpu import CpuFamily


class LerpArguments(ctypes.Structure):
    """The structure of the same name in cpu/mix/arguments.h. The next ones likewise."""

    _fields_ = fields(
        "x last maa low up outs grads gx glast gmaa glow gup cu_seqlens", "n tokens channels rank sequences"
    )


class ReluSquareArguments(ctypes.Structure):
    _fields_ = fields("x out grad gx", "tokens channels")


class NormGateArguments(ctypes.Structure):
    _fields_ = fields("y g weight bias out grad gy gg gweight gbias", "tokens channels size", "eps")


class SigmoidGateArguments(ctypes.Structure):
    _fields_ = fields("r v out grad gr gv", "tokens channels")


class DeltaKeysArguments(ctypes.Structure):
    _fields_ = fields("k low a0 k_k k_a key a b gkey ga gb gk glow ga0 gk_k gk_a", "tokens channels size")


class ValueResidualArguments(ctypes.Structure):
    _fields_ = fields("v first low v0 out grad gv gfirst glow gv0", "tokens channels")


class NormBonusGateArguments(ctypes.Structure):
    _fields_ = fields(
        "y r k v g r_k weight bias out grad gy gr gk gv gg gr_k gweight gbias", "tokens channels size", "eps"
    )


STRUCTURES = MappingProxyType(
    {
        "lerp": LerpArguments,
        "relu_square": ReluSquareArguments,
        "norm_gate": NormGateArguments,
        "sigmoid_gate": SigmoidGateArguments,
        "delta_keys": DeltaKeysArguments,
        "value_residual": ValueResidualArguments,
        "norm_bonus_gate": NormBonusGateArguments,
    }
)
FUNCTIONS = tuple(
    (f"mix_{name}_{direction}", None, structure)
    for name, structure in STRUCTURES.items()
    for direction in ("forward", "backward")
)
FAMILY = CpuFamily("mix", FUNCTIONS)


def call(name: str, like: torch.Tensor, tensors: Mapping[str, torch.Tensor | None], **sizes: float) -> None:
    """Run an operation, such as "relu_square_forward", given tensors by name (None: not given) and the rest of its
    structure. Does nothing for tensors without data."""
    if like.is_meta:
        return
    structure = STRUCTURES[name.rpartition("_")[0]]
    getattr(FAMILY.library(), f"mix_{name}")(fill(structure, like, tensors, **sizes))
