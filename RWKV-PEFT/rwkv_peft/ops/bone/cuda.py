"""Calls cuda/bone: bat-in's affine form, bat-out's merged weight, sums over shards, and the tile that each shard of a
result starts from, on NVIDIA GPUs.

The same functions as in cpu.py, for bfloat16 tensors on one GPU. For tensors without data they only
allocate.
"""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from ..native.calls import Operator, aligned, fields
from ..native.cuda import CudaFamily

RANKS = (16, 32, 64, 128)  # whose products there are
TOKENS = 64  # of a block's tile (32 at rank 128)
BLOCKS = 256  # blocks to fill a GPU with; the same on every GPU, so that results are the same
MOST_GROUPS = 8  # the most parts of a sum over shards
SHARD_THREADS = 128  # threads of a block in cuda/bone/shards.cuh
OF_RANK = ("affine_forward", "affine_backward", "merge")
SUMS = ("bone_shard_sum", "bone_tiled", "bone_sum_parts")
KERNELS = (*(f"bone_{name}_{rank}" for name in OF_RANK for rank in RANKS), *SUMS)


class BoneArguments(ctypes.Structure):
    """The structure of the same name in cuda/bone/arguments.cuh."""

    _fields_ = fields("x bone z shift d dx g parts tile tiled total", "tokens count", flags="width rank groups strip")


def affine(x: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
    """z = x + u and the parts of Σ_b u_b, with u_b = B_b x_b: x (T, in), bone (in/r, r, r) -> (T, in),
    (groups, T, r), which `tiled` adds up."""
    x, bone, rank = x.contiguous(), bone.contiguous(), bone.shape[-1]
    tile = _tile(rank)
    tiles = -(-x.shape[0] // tile)
    groups = min(MOST_GROUPS, bone.shape[0], -(-BLOCKS // tiles))
    z, shift = torch.empty_like(x), x.new_empty(groups, x.shape[0], rank)
    sizes = dict(tokens=x.shape[0], width=x.shape[1], rank=rank, groups=groups, blocks=tiles * groups)
    compute(f"affine_forward_{rank}", dict(x=x, bone=bone), dict(z=z, shift=shift), **sizes)
    return z, shift


def affine_backward_(dz: Tensor, g: Tensor, x: Tensor | None, bone: Tensor) -> Tensor | None:
    """Turn dz (T, in), contiguous, into dx, given g (T, out), the gradient of the output that the shift was added to.

    x (T, in) or None; bone (in/r, r, r) -> the gradient of bone, summed in float32, or None without x.
    """
    (tokens, width), (shards, rank, _) = dz.shape, bone.shape
    x, bone = None if x is None else x.contiguous(), bone.contiguous()
    tile = _tile(rank)
    strip = tile * max(1, -(-tokens // (-(-BLOCKS // shards) * tile)))
    strips = -(-tokens // strip)
    parts = None if x is None else dz.new_empty(strips, *bone.shape, dtype=torch.float32)
    read = dict(g=shard_sum(g, rank), x=x, bone=bone)
    sizes = dict(tokens=tokens, width=width, rank=rank, strip=strip, blocks=shards * strips)
    compute(f"affine_backward_{rank}", read, dict(dx=dz, parts=parts), **sizes)
    if parts is None:
        return None
    d_bone = torch.empty_like(bone)
    sizes = dict(groups=strips, count=bone.numel(), blocks=-(-bone.numel() // SHARD_THREADS))
    compute("sum_parts", dict(parts=parts), dict(total=d_bone), **sizes)
    return d_bone


def merge(rows: Tensor, bone: Tensor) -> Tensor:
    """W_ab + W_ab B_a + B_a for output blocks a: rows (a r, in), bone (a, r, r) of one of RANKS -> (a r, in)."""
    rows, bone, (count, rank, _) = rows.contiguous(), bone.contiguous(), bone.shape
    merged, width, tile = torch.empty_like(rows), rows.shape[1], _tile(rank)
    strip = tile * max(1, -(-width // (-(-BLOCKS // count) * tile)))  # of an output block's `width` rows of r elements
    sizes = dict(width=width, rank=rank, strip=strip, blocks=count * -(-width // strip))
    compute(f"merge_{rank}", dict(x=rows, bone=bone), dict(z=merged), **sizes)
    return merged


def shard_sum(x: Tensor, rank: int) -> Tensor:
    """Σ_b x_b, the last shard padded with zeros: (T, in) -> (T, r); x itself if it is one shard."""
    x = x.contiguous()
    if x.shape[1] == rank:
        return x
    total = x.new_empty(x.shape[0], rank)
    sizes = dict(tokens=x.shape[0], width=x.shape[1], rank=rank, blocks=_blocks(total))
    compute("shard_sum", dict(x=x), dict(total=total), **sizes)
    return total


def tiled(tile: Tensor, width: int) -> Tensor:
    """tile (T, r), or the sum of (groups, T, r), repeated along the channels, cut at `width`: -> (T, width)."""
    tile = tile.contiguous()
    groups, (tokens, rank) = tile.shape[0] if tile.dim() == 3 else 1, tile.shape[-2:]
    to = tile.new_empty(tokens, width)
    sizes = dict(tokens=tokens, width=width, rank=rank, groups=groups, blocks=_blocks(tile))
    compute("tiled", dict(tile=tile), dict(tiled=to), **sizes)
    return to


def takes(first: Tensor, *others: Tensor | None, rank: int = 0) -> bool:
    """True if the kernels take these tensors (None: not given), and products of `rank` (0: there are none)."""
    return rank in (0, *RANKS) and FAMILY.takes(first, *others)


def call(name: str, like: Tensor, tensors: Mapping[str, Tensor], blocks: int, **sizes: float) -> None:
    """Enqueue a kernel on the GPU of `like`. name: its name in KERNELS without "bone_"; tensors and sizes by the names
    of BoneArguments; dx is made in place of its gradient d."""
    read = {key: aligned(tensors[key]) for key in ("x", "bone", "g", "tile") if key in tensors}
    FAMILY.run(f"bone_{name}", like, {**tensors, **read, "d": tensors.get("dx"), **sizes}, blocks)


def _tile(rank: int) -> int:
    """The number of tokens in a block's tile."""
    return TOKENS if rank < RANKS[-1] else TOKENS // 2


def _blocks(tile: Tensor) -> int:
    """The number of blocks that gives each thread one element of a tile (T, r)."""
    return -(-tile.shape[-1] * tile.shape[-2] // SHARD_THREADS)


FAMILY = CudaFamily("bone", KERNELS, BoneArguments, in_graphs=True)
compute = Operator("bone_cuda", lambda *given, **sizes: call(*given, **sizes))
