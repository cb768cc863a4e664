"""A lerp's points in bat-in's affine form, or as they are, with sums over shards, on a GPU: what autograd Functions of
norms and points call to have cuda/mix/lerp_affine.cuh make them.

A point that is bent is in memory neither forward nor backward, which makes it again for the gradient of its matrices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..native.launch import aligned
from . import asked, cuda
from .asked import Asked
from .functions import Item, call, numbered
from .gpu_lerp import BLOCKS, group_size

Given = Mapping[str, Tensor | None]  # x and maa; low, up; stats, weight, bias; down: as the kernels' layouts name them


def fit(x: Tensor, rank: int) -> bool:
    """Whether the kernels bend points like x (B, T, C) by matrices of a rank."""
    return x.dtype == torch.bfloat16 and x.shape[-1] % cuda.AFFINE_CHANNELS == 0 and rank in cuda.AFFINE_RANKS


def takes(x: Tensor, bones: Sequence[Asked], kind: type = Tensor) -> bool:
    """Whether the kernels bend points like x (B, T, C) by matrices (C/r, r, r) of one rank, or give sums of one rank
    where the kind is int, None for a point that stays as it is."""
    return len(bones) <= cuda.MOST_POINTS and fit(x, asked.rank_of(bones, kind))


def bend(
    given: Given, bones: Sequence[Asked], last: Tensor | None, sizes: Mapping[str, Any], parts: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Points of `given` (B, T, C), those with matrices B (C/r, r, r) in `bones` bent by them, and the sums over shards
    (T, r) of what these are bent by, or of points with a rank r there. sizes as sizes_of has them. parts: where `given`
    has `down` (C, D), which takes the first point, that is not given back, but parts (groups, B, T, D) filled, as
    `parts_of` makes them."""
    x, down, count = _x_of(given), given.get("down"), len(_present(bones))
    ranks = _ranks(given, bones) | asked.sizes_of([bone if isinstance(bone, int) else None for bone in bones])
    size, blocks = _group_of(x, bones, down)
    outs = [torch.empty_like(x) for _ in range(len(bones) - (down is not None))]
    groups = -(-x.shape[2] // size)
    shifts = x.new_empty(count, groups, sizes["tokens"], ranks["rank"])
    tensors = {**given, "x": x, **numbered("bone", map(aligned, asked.matrices(bones)))}
    tensors |= numbered("out", outs if down is None else (None, *outs)) | dict(parts=parts, shifts=shifts)
    call("lerp_affine_forward", x, tensors, last=last, size=size, slots=blocks, **ranks, **sizes)
    return outs, list((shifts[:, 0] if groups == 1 else shifts.sum(1)).unbind())


def parts_of(x: Tensor, bones: Sequence[Asked], down: Tensor) -> Tensor:
    """Room for what `down` (C, D) makes of each group's channels of the first point, float32."""
    return x.new_empty(-(-x.shape[2] // _group_of(x, bones, down)[0]), *x.shape[:2], down.shape[1], dtype=torch.float32)


def bend_back(
    given: Given,
    bones: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    gshifts: Sequence[Tensor | None],
    trained: bool,
    last: Tensor | None,
    sizes: Mapping[str, Any],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gradients of the points, and those of bones where these are trained, from those of bent points (any tensor
    for a point that `down` takes) and shifts (None for one that nobody uses)."""
    x, present = _x_of(given), _present(bones)
    (first, *_), steps = present, x.shape[2] // cuda.AFFINE_CHANNELS
    tiles = -(-BLOCKS // (steps * len(present)))  # strips at the least, so that blocks fill a GPU
    strip = cuda.TILE_TOKENS * max(1, -(-sizes["tokens"] // (tiles * cuda.TILE_TOKENS)))
    strips = -(-sizes["tokens"] // strip)
    parts = x.new_empty(strips, len(present), *first.shape, dtype=torch.float32) if trained else None
    points = [grad if bone is None else torch.empty_like(x) for grad, bone in zip(grads, bones, strict=True)]
    of_bent = [None if bone is None else aligned(grad) for grad, bone in zip(grads, bones, strict=True)]
    ordered = iter(gshifts)
    of_shifts = [None if bone is None else aligned(_or_zeros(next(ordered), x, sizes, first)) for bone in bones]
    tensors = {**given, "x": x, **numbered("bone", map(aligned, bones)), **numbered("grad", of_bent)}
    tensors |= numbered("gshift", of_shifts)
    tensors |= numbered("out", [None if bone is None else point for point, bone in zip(points, bones, strict=True)])
    tensors |= dict(down=None, parts=parts)
    numbers = dict(size=cuda.AFFINE_CHANNELS, slots=len(present), strip=strip)
    call("lerp_affine_backward", x, tensors, last=last, **numbers, **_ranks(given, bones), **sizes)
    gbones: list[Tensor | None] = [None] * len(bones)
    if parts is not None:
        total = first.new_empty(parts.shape[1:])
        rank = first.shape[-1]
        call("sum_parts", total, dict(parts=parts, total=total), tokens=total.numel() // rank, channels=rank, n=strips)
        sums = iter(total.unbind())
        gbones = [None if bone is None else next(sums) for bone in bones]
    return points, gbones


def _or_zeros(gshift: Tensor | None, x: Tensor, sizes: Mapping[str, Any], bone: Tensor) -> Tensor:
    return x.new_zeros(sizes["tokens"], bone.shape[-1]) if gshift is None else gshift


def _ranks(given: Given, bones: Sequence[Asked]) -> dict[str, int]:
    up = given.get("up")
    return dict(rank=asked.rank_of(bones, (Tensor, int)), low_rank=0 if up is None else up.shape[1])


def _x_of(given: Given) -> Tensor:
    x = aligned(given["x"])
    assert x is not None  # as the kernels have it
    return x


def _group_of(x: Tensor, bones: Sequence[Asked], down: Tensor | None) -> tuple[int, int]:
    """Channels of a block in forward, and blocks that a tile has for as many: one a point, or as many as `down` has
    steps of columns."""
    blocks = len(bones) if down is None else len(bones) - 1 + down.shape[1] // cuda.AFFINE_CHANNELS
    return group_size(x, cuda.AFFINE_CHANNELS, cuda.AFFINE_TOKENS / blocks), blocks


def _present(bones: Sequence[Item | None]) -> list[Item]:
    return [bone for bone in bones if bone is not None]
