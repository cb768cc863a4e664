"""Products with the small square matrices of Bone's block affine forms on the CPU: builds cuda/blocks_cpu.cpp on first
use and calls it through its C interface.

float32 and bfloat16 tensors; where `takes` says no, the callers' plain torch form serves. Rows of tensors that are only
read may lie apart; the others are contiguous. Gradients of these functions are in adapters/functional.py and
adapters/weight_side.py.
"""

import ctypes
import functools

import torch

from . import cpu
from .build import BuildError, Unit, build_library, source_directory

# Instruction sets, fastest first: for bfloat16 the matrix unit of recent Xeons, then those of cpu.py.
LEVELS = ("amx", *cpu.LEVELS)


def takes(first, *others):
    """Whether tensors are what the kernels take: real, on the CPU, of one dtype, and a kernel can be built here."""
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.bfloat16)
        and all([x is None or (x.dtype == first.dtype and x.device == first.device) for x in others])
        and first.numel() > 0
        and not torch.compiler.is_compiling()
        and type(first) is torch.Tensor  # not a fake one
        and best_level() is not None
    )


def affine(x, bone, level=None):
    """z = x + u and Σ_b u_b, where u_b = B_b x_b: x (T, in), bone (in/r, r, r) -> (T, in), (T, r)."""
    x, rank = _rows(x), bone.shape[-1]
    _check_shards(x, rank, bone.shape[0])
    z, shift = x.new_empty(x.shape), x.new_empty(x.shape[0], rank)
    _library(level or best_level()).blocks_affine(
        *_strided(x), bone.contiguous().data_ptr(), z.data_ptr(), shift.data_ptr(), *x.shape, rank, *_kind(x)
    )
    return z, shift


def affine_backward_(dz, g, x, bone, level=None):
    """Turn dz (T, in), contiguous, into dx, given g (T, out), the gradient of the output that the shift was added to.

    x (T, in) or None; bone (in/r, r, r) -> the gradient of bone, or None without x.
    """
    g, x = _rows(g), None if x is None else _rows(x)
    _check_shards(dz, bone.shape[-1], bone.shape[0])
    _check_shards(g, bone.shape[-1])
    d_bone = None if x is None else torch.zeros(bone.shape)
    _library(level or best_level()).blocks_affine_backward(
        dz.data_ptr(),
        *_strided(g),
        *((None, 0) if x is None else _strided(x)),
        bone.contiguous().data_ptr(),
        None if x is None else d_bone.data_ptr(),
        *dz.shape,
        g.shape[1],
        bone.shape[-1],
        *_kind(dz),
    )
    return None if x is None else d_bone.to(bone.dtype)


def merge(rows, bone, level=None):
    """W_ab + W_ab B_a + B_a for output blocks a: rows (a r, in), bone (a, r, r) -> (a r, in)."""
    merged = rows.new_empty(rows.shape)
    _merge(rows, bone, merged, None, level)
    return merged


def merge_backward_(d, rows, bone, level=None):
    """Turn d (a r, in), contiguous, the gradient of merge(rows, bone), into that matrix itself; -> the gradient of
    bone."""
    d_bone = torch.zeros(bone.shape)
    _merge(rows, bone, d, d_bone, level)
    return d_bone.to(bone.dtype)


def _merge(rows, bone, merged, d_bone, level):
    rows, (count, rank, _) = rows.contiguous(), bone.shape
    _check_shards(rows, rank)
    if rows.shape[0] != count * rank:
        raise ValueError(f"{rows.shape[0]} rows are not {count} blocks of {rank}")
    _library(level or best_level()).blocks_merge(
        rows.data_ptr(),
        bone.contiguous().data_ptr(),
        merged.data_ptr(),
        None if d_bone is None else d_bone.data_ptr(),
        count,
        rows.shape[1],
        rank,
        *_kind(rows),
    )


def transposed(x, level=None):
    """x (T, n) -> (n, T): a view, except where the matrix unit's products take a copy in half the time (bfloat16 on
    AMX)."""
    if x.dtype != torch.bfloat16 or not takes(x) or (level or best_level()) != "amx":
        return x.t()
    x = _rows(x)
    turned = x.new_empty(x.shape[1], x.shape[0])
    _library("amx").blocks_transpose(*_strided(x), turned.data_ptr(), *x.shape, torch.get_num_threads())
    return turned


def shard_sum(x, rank, level=None):
    """Σ_b x_b, the last shard padded with zeros: (T, in) -> (T, r)."""
    x = _rows(x)
    total = x.new_empty(x.shape[0], rank)
    _library(level or best_level()).blocks_shard_sum(*_strided(x), total.data_ptr(), *x.shape, rank, *_kind(x))
    return total


def add_tiled_(y, tile, level=None):
    """y (T, n), contiguous, += tile (T, r) repeated along its rows, cut at n."""
    _library(level or best_level()).blocks_add_tiled(
        y.data_ptr(), tile.contiguous().data_ptr(), *y.shape, tile.shape[1], *_kind(y)
    )


@functools.cache
def best_level():
    """The fastest of LEVELS that works here; None where no compiler is."""
    best = cpu.best_level()
    for level in ("amx", best) if best == "avx512bf16" else (best,):
        if available(level):
            return level
    return None


@functools.cache
def available(level):
    """Whether this processor has one of LEVELS and its kernels can be built."""
    if LEVELS.index(level) < LEVELS.index(cpu.best_level()) and (level != "amx" or cpu.best_level() != "avx512bf16"):
        return False
    try:
        return bool(_library(level).blocks_start())
    except BuildError:
        return False


@functools.cache
def _library(level):
    return build(f"blocks_cpu_{level}", level_flags()[level])


def level_flags():
    """The instruction sets of this machine's architecture -> the compiler's flags."""
    return {"amx": (*cpu.AVX512BF16_FLAGS, "-mamx-tile", "-mamx-bf16"), **cpu.level_flags()}


def build(name, flags, headers=()):
    """The kernels as a loaded library, compiled with `flags`, and anew when one of `headers` changes; BuildError where
    that fails."""
    sources = source_directory()
    command = (cpu.find_compiler(), *cpu.COMMON_FLAGS, *flags)
    headers = [*sorted(sources.glob("blocks_*.h")), sources / "bfloat16.h", *headers]
    path = build_library(
        name, [Unit(sources / "blocks_cpu.cpp", command)], (command[0], "-shared", "-fopenmp"), headers
    )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete that file so that it is built anew") from error
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    rows, kind = [pointer, size], [flag, flag]  # a tensor and its stride; bfloat16, threads
    for name, arguments in (
        ("affine", [*rows, *[pointer] * 3, *[size] * 3, *kind]),
        ("affine_backward", [pointer, *rows, *rows, pointer, pointer, *[size] * 4, *kind]),
        ("merge", [*[pointer] * 4, *[size] * 3, *kind]),
        ("shard_sum", [*rows, pointer, *[size] * 3, *kind]),
        ("add_tiled", [pointer, pointer, *[size] * 3, *kind]),
    ):
        function = getattr(library, f"blocks_{name}")
        function.argtypes, function.restype = arguments, None
    if hasattr(library, "blocks_transpose"):
        library.blocks_transpose.argtypes = [*rows, pointer, size, size, flag]
    return library


def _check_shards(x, rank, count=None):
    if x.shape[1] % rank or count not in (None, x.shape[1] // rank):
        raise ValueError(f"rows of {x.shape[1]} are not {'shards' if count is None else f'{count} shards'} of {rank}")


def _rows(x):
    """x with whole rows, which may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _strided(x):
    return x.data_ptr(), x.stride(0)


def _kind(x):
    return x.dtype == torch.bfloat16, torch.get_num_threads()
