"""Products with the small square matrices of Bone's block affine forms on the CPU: builds cpu/bone on first use and
calls it through its C interface.

Takes float32 and bfloat16 tensors; __init__.py computes the others in plain torch. Rows of read-only tensors may have
gaps between them; the other tensors are contiguous.
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..native import cpu
from ..native.build import BuildError
from ..native.calls import Operator, fields, fill
from ..native.cpu import CpuFamily, cpu_library

# Instruction sets, fastest first: AMX, the matrix unit of recent Xeons (bfloat16), then those of every kernel.
LEVELS = ("amx", *cpu.LEVELS)


class AffineArguments(ctypes.Structure):
    """The structure of the same name in cpu/bone/arguments.h. The next ones likewise."""

    _fields_ = fields("x bone z shift d g d_bone", "x_stride g_stride tokens in_features out_features rank")


class MergeArguments(ctypes.Structure):
    _fields_ = fields("w bone merged d_bone", "count in_features rank")


class TransposeArguments(ctypes.Structure):
    _fields_ = fields("x to", "x_stride rows columns")


class ShardSumArguments(ctypes.Structure):
    _fields_ = fields("x total", "x_stride tokens in_features rank")


class AddTiledArguments(ctypes.Structure):
    _fields_ = fields("y tile", "tokens width rank")


FUNCTIONS = (
    ("bone_start", ctypes.c_int),
    ("bone_affine", None, AffineArguments),
    ("bone_affine_backward", None, AffineArguments),
    ("bone_merge", None, MergeArguments),
    ("bone_shard_sum", None, ShardSumArguments),
    ("bone_add_tiled", None, AddTiledArguments),
)
AMX_FUNCTIONS = (("bone_transpose", None, TransposeArguments),)


class BoneFamily(CpuFamily):
    """The functions of cpu/bone, of one of its LEVELS."""

    @functools.cache  # noqa: B019 - families live as long as their modules
    def best_level(self) -> str:
        return cpu.best_level() if self.unavailable("amx") else "amx"

    @functools.cache  # noqa: B019
    def unavailable(self, level: str = "") -> str | None:
        if level != "amx":
            return super().unavailable(level)
        try:
            has_unit = cpu.best_level() == "avx512bf16" and self.library("amx").bone_start()
        except BuildError as error:
            return str(error)
        return None if has_unit else f"this processor has no matrix unit; its best is {cpu.best_level()}"

    def build_level(
        self, level: str, name: str = "", flags: Sequence[str] = (), headers: Sequence[Path] = ()
    ) -> ctypes.CDLL:
        """Build and load a level's functions, with `name` and `flags` added to its own; built anew if one of `headers`
        changes, too."""
        functions = FUNCTIONS + (AMX_FUNCTIONS if level == "amx" else ())
        flags = (*level_flags()[level], *flags)
        return cpu_library(f"bone_cpu_{level}{name}", "bone/bone.cpp", flags, functions, headers)


FAMILY = BoneFamily("bone", FUNCTIONS, in_graphs=True)


def call(name: str, like: Tensor, tensors: Mapping[str, Tensor], **sizes: float) -> None:
    """Run the function bone_NAME, given NAME or, for an instruction set, NAME:LEVEL, and its structure's fields."""
    name, _, level = f"bone_{name}".partition(":")
    structure = next(arguments[0] for function, _, *arguments in FUNCTIONS + AMX_FUNCTIONS if function == name)
    getattr(FAMILY.library(level), name)(fill(structure, like, tensors, **sizes))


compute = Operator("bone_cpu", call)


def affine(x: Tensor, bone: Tensor, level: str = "") -> tuple[Tensor, Tensor]:
    """z = x + u and Σ_b u_b, with u_b = B_b x_b: x (T, in), bone (in/r, r, r) -> (T, in), (T, r)."""
    x, rank = _rows(x), bone.shape[-1]
    assert x.shape[1] == rank * bone.shape[0]
    z, shift = x.new_empty(x.shape), x.new_empty(x.shape[0], rank)
    sizes = dict(x_stride=x.stride(0), tokens=x.shape[0], in_features=x.shape[1], rank=rank)
    compute(f"affine:{level}", dict(x=x, bone=bone.contiguous()), dict(z=z, shift=shift), **sizes)
    return z, shift


def affine_backward_(dz: Tensor, g: Tensor, x: Tensor | None, bone: Tensor, level: str = "") -> Tensor | None:
    """Turn dz (T, in), contiguous, into dx, given g (T, out), the gradient of the output that the shift was added to.

    x (T, in) or None; bone (in/r, r, r) -> the gradient of bone, or None without x.
    """
    g, x = _rows(g), None if x is None else _rows(x)
    assert dz.shape[1] == bone.shape[0] * bone.shape[-1] and g.shape[1] % bone.shape[-1] == 0
    d_bone = None if x is None else torch.empty_like(bone, memory_format=torch.contiguous_format)
    read, written = dict(g=g, x=x, bone=bone.contiguous()), dict(d=dz, d_bone=d_bone)
    strides = dict(g_stride=g.stride(0), x_stride=0 if x is None else x.stride(0))
    sizes = dict(tokens=dz.shape[0], in_features=dz.shape[1], out_features=g.shape[1], rank=bone.shape[-1])
    compute(f"affine_backward:{level}", read, written, **strides, **sizes)
    return d_bone


def merge(rows: Tensor, bone: Tensor, level: str = "") -> Tensor:
    """W_ab + W_ab B_a + B_a for output blocks a: rows (a r, in), bone (a, r, r) -> (a r, in)."""
    merged = rows.new_empty(rows.shape)
    _merge(rows, bone, merged, None, level)
    return merged


def merge_backward_(d: Tensor, rows: Tensor, bone: Tensor, level: str = "") -> Tensor:
    """Replace d (a r, in), contiguous, the gradient of merge(rows, bone), by that itself -> the gradient of bone."""
    d_bone = torch.empty_like(bone, memory_format=torch.contiguous_format)
    _merge(rows, bone, d, d_bone, level)
    return d_bone


def _merge(rows: Tensor, bone: Tensor, merged: Tensor, d_bone: Tensor | None, level: str) -> None:
    rows, (count, rank, _) = rows.contiguous(), bone.shape
    assert rows.shape[0] == count * rank and rows.shape[1] % rank == 0
    read, written = dict(w=rows, bone=bone.contiguous()), dict(merged=merged, d_bone=d_bone)
    compute(f"merge:{level}", read, written, count=count, in_features=rows.shape[1], rank=rank)


def transposed(x: Tensor, level: str = "") -> Tensor:
    """x (T, n) -> (n, T): a view, but for bfloat16 on AMX a copy, with which products take half the time."""
    is_plain = x.dtype != torch.bfloat16 or torch.compiler.is_compiling() or not FAMILY.takes(x)
    if is_plain or (level or FAMILY.best_level()) != "amx":
        return x.t()
    x = _rows(x)
    turned = x.new_empty(x.shape[1], x.shape[0])
    compute("transpose:amx", dict(x=x), dict(to=turned), x_stride=x.stride(0), rows=x.shape[0], columns=x.shape[1])
    return turned


def shard_sum(x: Tensor, rank: int, level: str = "") -> Tensor:
    """Σ_b x_b, the last shard padded with zeros: (T, in) -> (T, r)."""
    x = _rows(x)
    total = x.new_empty(x.shape[0], rank)
    sizes = dict(x_stride=x.stride(0), tokens=x.shape[0], in_features=x.shape[1], rank=rank)
    compute(f"shard_sum:{level}", dict(x=x), dict(total=total), **sizes)
    return total


def add_tiled_(y: Tensor, tile: Tensor, level: str = "") -> None:
    """y (T, n), contiguous, += tile (T, r) repeated along the channels, cut at n."""
    sizes = dict(tokens=y.shape[0], width=y.shape[1], rank=tile.shape[1])
    compute(f"add_tiled:{level}", dict(tile=tile.contiguous()), dict(y=y), **sizes)


def level_flags() -> dict[str, tuple[str, ...]]:
    """The instruction sets of this machine's architecture -> the compiler's flags."""
    return {"amx": (*cpu.AVX512BF16_FLAGS, "-mamx-tile", "-mamx-bf16"), **cpu.level_flags()}


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows, which may have gaps between them."""
    return x if x.stride(1) == 1 else x.contiguous()
