"""Calls cuda/bone: bat-in's affine form, bat-out's merged weight, sums over shards, and the tile that each shard of a
result starts from, on NVIDIA GPUs.

The functions are those of cpu.py, for float32 and bfloat16 tensors on one GPU. For tensors without data they only
allocate.
"""

import ctypes
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ..native.arguments import Given, aligned, fields
from ..native.family import DTYPES, CudaFamily

PRODUCT_RANKS = (16, 32, 64, 128)  # ranks whose products run on tensor cores, in bfloat16
MOST_RANK = 64  # the largest rank of the kernels that do without tensor cores
TOKENS, PLAIN_TOKENS = 64, 16  # tokens of a block's tile with tensor cores (32 at rank 128) and without
BLOCKS = 256  # blocks to fill a GPU with; the same on every GPU, so that results are the same
MOST_GROUPS = 8  # the most parts of a sum over shards
SHARD_THREADS = 128  # threads of a block in cuda/bone/shards.cuh
OF_RANK = ("affine_forward", "affine_backward", "merge")
OF_DTYPE = ("affine_forward", "affine_backward", "shard_sum", "tiled", "sum_parts")
KERNELS = (
    *(f"bone_{name}_products_{rank}" for name in OF_RANK for rank in PRODUCT_RANKS),
    *(f"bone_{name}_{dtype}" for name in OF_DTYPE for dtype in DTYPES.values()),
)


class BoneArguments(ctypes.Structure):
    """The structure of the same name in cuda/bone/arguments.cuh."""

    _fields_ = fields(
        "x bone z shift d dx g parts tile tiled total", "tokens count", "factor", "width rank groups strip"
    )


def affine(x: Tensor, bone: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """z = x + u and the parts of factor Σ_b u_b, with u_b = B_b x_b: x (T, in), bone (in/r, r, r) -> (T, in),
    (groups, T, r), which `tiled` adds up."""
    x, bone, rank = _whole(x), _whole(bone), bone.shape[-1]
    tile = _tile(x, rank)
    tiles = -(-x.shape[0] // tile)
    groups = min(MOST_GROUPS, bone.shape[0], -(-BLOCKS // tiles))
    z, shift = torch.empty_like(x), x.new_empty(groups, x.shape[0], rank)
    tensors = dict(x=x, bone=bone, z=z, shift=shift)
    sizes = dict(tokens=x.shape[0], width=x.shape[1], rank=rank, groups=groups, factor=factor)
    call(_affine_kernel("forward", x, rank), x, tensors, tiles * groups, **sizes)
    return z, shift


def affine_backward_(dz: Tensor, g: Tensor, x: Tensor | None, bone: Tensor, factor: float = 1.0) -> Tensor | None:
    """Turn dz (T, in), contiguous, into dx, given g (T, out), the gradient of the output that the shift was added to.

    x (T, in) or None; bone (in/r, r, r) -> the gradient of bone, summed in float32, or None without x.
    """
    (tokens, width), (shards, rank, _) = dz.shape, bone.shape
    x, bone = _whole(x), _whole(bone)
    tile = _tile(dz, rank)
    strip = tile * max(1, -(-tokens // (-(-BLOCKS // shards) * tile)))
    strips = -(-tokens // strip)
    parts = None if x is None else dz.new_empty(strips, *bone.shape, dtype=torch.float32)
    tensors = dict(x=x, bone=bone, d=dz, dx=dz, g=shard_sum(g, rank), parts=parts)
    sizes = dict(tokens=tokens, width=width, rank=rank, strip=strip, factor=factor)
    call(_affine_kernel("backward", dz, rank), dz, tensors, shards * strips, **sizes)
    if parts is None:
        return None
    d_bone = torch.empty_like(bone)
    count = bone.numel()
    call("sum_parts", bone, dict(parts=parts, total=d_bone), -(-count // SHARD_THREADS), groups=strips, count=count)
    return d_bone


def merge(rows: Tensor, bone: Tensor) -> Tensor:
    """W_ab + W_ab B_a + B_a for output blocks a: rows (a r, in), bone (a, r, r) of PRODUCT_RANKS -> (a r, in)."""
    rows, bone, (count, rank, _) = _whole(rows), _whole(bone), bone.shape
    merged, width, tile = torch.empty_like(rows), rows.shape[1], _tile(rows, rank)
    strip = tile * max(1, -(-width // (-(-BLOCKS // count) * tile)))  # of an output block's `width` rows of r elements
    blocks = count * -(-width // strip)
    call(f"merge_products_{rank}", rows, dict(x=rows, bone=bone, z=merged), blocks, width=width, rank=rank, strip=strip)
    return merged


def shard_sum(x: Tensor, rank: int) -> Tensor:
    """Σ_b x_b, the last shard padded with zeros: (T, in) -> (T, r); x itself if it is one shard."""
    x = _whole(x)
    if x.shape[1] == rank:
        return x
    total = x.new_empty(x.shape[0], rank)
    call("shard_sum", x, dict(x=x, total=total), _blocks(total), tokens=x.shape[0], width=x.shape[1], rank=rank)
    return total


def tiled(tile: Tensor, width: int) -> Tensor:
    """tile (T, r), or the sum of (groups, T, r), repeated along the channels, cut at `width`: -> (T, width)."""
    tile = _whole(tile)
    groups, (tokens, rank) = tile.shape[0] if tile.dim() == 3 else 1, tile.shape[-2:]
    to = tile.new_empty(tokens, width)
    sizes = dict(tokens=tokens, width=width, rank=rank, groups=groups)
    call("tiled", to, dict(tiled=to, tile=tile), _blocks(tile), **sizes)
    return to


def takes(first: Tensor, *others: Tensor | None, rank: int = 0) -> bool:
    """True if the kernels take these tensors (None: not given), and products of `rank`: any rank up to MOST_RANK, and
    larger ones on tensor cores."""
    return (rank <= MOST_RANK or has_products(first, rank)) and FAMILY.takes(first, *others)


def call(name: str, like: Tensor, tensors: Mapping[str, Tensor | None], blocks: int, **sizes: float) -> None:
    """Enqueue a kernel on the GPU of `like`. name: its name in KERNELS without "bone_", and without the dtype if there
    is one kernel for each; tensors and sizes by the names of BoneArguments."""
    kernel = f"bone_{name}" if f"bone_{name}" in KERNELS else f"bone_{name}_{DTYPES[like.dtype]}"
    FAMILY.run(kernel, like, {**tensors, **sizes}, blocks)


def has_products(like: Tensor, rank: int) -> bool:
    """True if products of a rank run on tensor cores."""
    return like.dtype == torch.bfloat16 and rank in PRODUCT_RANKS


def _affine_kernel(way: str, like: Tensor, rank: int) -> str:
    return f"affine_{way}_products_{rank}" if has_products(like, rank) else f"affine_{way}"


def _tile(like: Tensor, rank: int) -> int:
    """The number of tokens in a block's tile."""
    if not has_products(like, rank):
        return PLAIN_TOKENS
    return TOKENS if rank < PRODUCT_RANKS[-1] else TOKENS // 2


def _blocks(tile: Tensor) -> int:
    """The number of blocks that gives each thread one element of a tile (T, r)."""
    return -(-tile.shape[-1] * tile.shape[-2] // SHARD_THREADS)


def _whole(x: Given) -> Given:
    """x contiguous and aligned, so that copies of 16 bytes can read it."""
    return x if x is None else aligned(cast(Given, x.contiguous()))


FAMILY = CudaFamily("bone", KERNELS, BoneArguments)
