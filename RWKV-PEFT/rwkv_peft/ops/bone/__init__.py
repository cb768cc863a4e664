"""The operations of Bone's forms beside their product with the weight: bat-in's affine form of the activations,
bat-out's merged weight, sums over shards, and a tile added to each shard.

Each operation is written out in plain torch, which takes any device and dtype. float32 and bfloat16 tensors on CPUs,
and bfloat16 ones on GPUs, go through the kernels of cpu.py and cuda.py if those can be built, in graphs of
torch.compile too. No operation is differentiable: the autograd Functions are in adapters/.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..products import addmm_, matmul
from . import cpu, cuda

CACHED_ELEMENTS = 1 << 18  # elements of merged rows that a CPU's cache holds while they are made


def backend(first: Tensor, *others: Tensor | None, rank: int = 0) -> ModuleType | None:
    """The module (cpu or cuda) with kernels for these tensors (None: not given) and products of a rank, or None for
    plain torch: the one place that decides."""
    if first.is_cpu:
        return cpu if cpu.FAMILY.takes(first, *others) else None
    return cuda if cuda.takes(first, *others, rank=rank) else None


def affine(x: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
    """z = x + u and s = Σ_b u_b, with u_b = B_b x_b: x (T, in), bone (in/r, r, r) -> z (T, in), and s in a form
    that plus_tiled takes."""
    kernels, rank = backend(x, bone, rank=bone.shape[-1]), bone.shape[-1]
    if kernels is not None:
        return kernels.affine(x, bone)
    z, shift = torch.empty_like(x), x.new_empty(x.shape[0], rank)
    for tokens in _token_chunks(x):
        z[tokens] = x[tokens]  # in memory's order, so that the strided reads below find it in the cache
        shards = split_shards(z[tokens], rank).transpose(0, 1)  # (in/r, t, r)
        u = matmul(shards, bone.transpose(1, 2))
        torch.sum(u, 0, out=shift[tokens])
        shards += u
    return z, shift


def affine_backward_(dz: Tensor, g: Tensor, x: Tensor | None, bone: Tensor) -> Tensor | None:
    """Turn dz (T, in) into dx in place, given g (T, out), the gradient of the output that s was added to;
    -> the gradient of bone if x (T, in) is given, else None.

    du_b = dz_b + Σ_a g_a, dB_b = du_bᵀ x_b, dx_b = dz_b + B_bᵀ du_b.
    """
    kernels, rank = backend(dz, g, x, bone, rank=bone.shape[-1]), bone.shape[-1]
    if kernels is not None and dz.is_contiguous():
        return kernels.affine_backward_(dz, g, x, bone)
    g_shift = split_shards(g, rank).sum(1)  # (T, r)
    d_bone = None if x is None else bone.new_zeros(bone.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for tokens in _token_chunks(dz):
        shards = split_shards(dz[tokens], rank).transpose(0, 1)  # (in/r, t, r)
        du = torch.add(shards, g_shift[tokens], out=shards.new_empty(shards.shape))
        if x is not None and d_bone is not None:
            _accumulate_bmm(d_bone, du.transpose(1, 2), split_shards(x[tokens], rank).transpose(0, 1))
        shards += matmul(du, bone)
    return None if d_bone is None else d_bone.to(bone.dtype)


def merge(rows: Tensor, bone: Tensor) -> Tensor:
    """W + W B + B for some output blocks of bat-out: rows (a r, in), bone (a, r, r) -> (a r, in)."""
    kernels = backend(rows, bone, rank=bone.shape[-1])
    if kernels is not None:
        return kernels.merge(rows, bone)
    parts = rows_by_block(rows, bone)  # (a, r in/r, r)
    merged = torch.empty_like(parts)
    step = len(bone) if not rows.is_cpu else max(1, CACHED_ELEMENTS // parts[0].numel())
    for start in range(0, len(bone), step):
        some = slice(start, start + step)
        addmm_(merged[some].copy_(parts[some]), parts[some], bone[some])
        merged[some].unflatten(1, (bone.shape[-1], -1)).add_(bone[some, :, None])
    return merged.view_as(rows)


def merge_backward_(d: Tensor, rows: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
    """merge(rows, bone), which may take d's memory, and bone's gradient, given the merged rows' gradient d (a r,
    in)."""
    if backend(d, rows, bone) is cpu and d.is_contiguous():
        d_bone = cpu.merge_backward_(d, rows, bone)
        return d, d_bone
    d_bone = matmul(rows_by_block(rows, bone).transpose(1, 2), rows_by_block(d, bone))
    d_bone += rows_by_block(d, bone).unflatten(1, (bone.shape[-1], -1)).sum(2)
    return merge(rows, bone), d_bone


def rows_by_block(rows: Tensor, bone: Tensor) -> Tensor:
    """View rows of a weight (a r, in) as (a, r in/r, r), so that B_a multiplies from the right."""
    return rows.view(bone.shape[0], -1, bone.shape[-1])


def shard_sum(x: Tensor, rank: int) -> Tensor:
    """Σ_b x_b, the last shard padded with zeros: (T, in) -> (T, r)."""
    kernels = backend(x)
    if kernels is not None:
        return kernels.shard_sum(x, rank)
    full = x.shape[1] // rank * rank
    total = split_shards(x[:, :full], rank).sum(1) if full else x.new_zeros(x.shape[0], rank)
    rest = x.shape[1] - full
    if rest:
        total[:, :rest] += x[:, full:]
    return total


def plus_tiled(
    tile: Tensor, width: int, product: Callable[[], Tensor], add_product_: Callable[[Tensor], None]
) -> Tensor:
    """A product (T, width) plus tile (T, r), or s of `affine`, repeated along the channels, cut at width.

    product() makes the product, add_product_(y) adds it to y. A GPU starts from the tiles and adds the product to them,
    which saves a pass over the result; a CPU adds the tiles while the result is in its cache.
    """
    if backend(tile) is cuda:
        y = cuda.tiled(tile, width)
        add_product_(y)
    else:
        y = product()
        _add_tiled_(y, tile)
    return y


def _add_tiled_(x: Tensor, tile: Tensor) -> None:
    if backend(x, tile) is cpu and x.is_contiguous():
        return cpu.add_tiled_(x, tile)
    tile = tile.sum(0) if tile.dim() == 3 else tile
    rank = tile.shape[-1]
    full = x.shape[1] // rank * rank
    if full:
        split_shards(x[:, :full], rank).add_(tile[:, None])
    if full != x.shape[1]:
        x[:, full:] += tile[:, : x.shape[1] - full]


def split_shards(x: Tensor, rank: int) -> Tensor:
    """(T, n r) -> (T, n, r)."""
    return x.unflatten(1, (-1, rank))


def _token_chunks(x: Tensor) -> list[slice]:
    """Slices of tokens so short that the work on x (T, in) stays in the cache (CPU) or in memory (GPU). torch.compile,
    which makes its own loops, gets one slice of all tokens, because a number of slices would fix T."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    elements = 1 << 18 if x.device.type == "cpu" else 1 << 26
    step = max(64, elements // max(1, x.shape[1]) // 64 * 64)
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def _accumulate_bmm(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right; total may have a wider dtype."""
    if total.dtype == left.dtype:
        addmm_(total, left, right)
    else:
        total += matmul(left, right)
