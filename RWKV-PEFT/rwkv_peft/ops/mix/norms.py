"""Layer norm, with token shift and interpolation or without, on a GPU: autograd Functions over cuda/mix/layer_norm.cuh
and norm_lerp.cuh. They give their input once more, for the residual, so that backward need not add up its gradients.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import affine, asked, lefts
from .functions import call, differentiable_once, numbered, room_like, rounded, sums_like, with_zeros
from .gpu_lerp import sizes_of

STRIPS, MOST_STRIP = 1024, 8  # blocks that a GPU has enough of, whichever; tokens that one has at most


class LayerNorm(Function):
    """x (B, T, C), weight and bias (C,), eps -> x, layer norm of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, stats = torch.empty_like(x), x.new_empty(x[..., 0].numel(), 2, dtype=torch.float32)
        ctx.save_for_backward(x, weight, bias, stats)
        tensors = dict(x=x, out=out, weight=weight, bias=bias, stats=stats)
        call("layer_norm_forward", x, tensors, eps=eps, **_rows(x))
        return x, out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, passed: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        gx = torch.empty_like(x)
        tensors = dict(x=x, grad=grad, passed=passed, stats=stats, weight=weight, gx=gx)
        call("layer_norm_backward", x, tensors, **_rows(x))
        sums = sums_like((weight, bias), any(ctx.needs_input_grad[1:3]))
        if sums[0] is not None:
            tensors = dict(x=x, grad=grad, stats=stats, gweight=sums[0], gbias=sums[1])
            call("layer_norm_sums", x, tensors, **_rows(x))
        return gx, *rounded(sums, weight.dtype), None


class NormLerp(Function):
    """x (B, T, C), last (n, C) or None, weight and bias (C,), maa (m, C), none of them trained, eps, cu_seqlens int64
    or None, whether the norm itself is wanted, the point that is wanted twice or None, what was left of x (parts, B T,
    r) or None; of each point the rank of its sum over shards, or None, or nothing; of each point the matrices (C/r, r,
    r) that bend it, or None, or nothing; the norm is not wanted then -> x with what was left, the last of each
    sequence's norms (n, C), the norm where wanted, m or m + 1 times (B, T, C), the sums over shards (T, r) of points
    that are bent or have a rank."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        last: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        maa: Tensor,
        eps: float,
        cu_seqlens: Tensor | None,
        whole: bool,
        twice: int | None,
        left: Tensor | None,
        ranks: Sequence[int | None],
        *bones: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.left, ctx.ranks, of_sums = lefts.sizes_of(left), ranks, asked.sizes_of(ranks)
        sizes, total = sizes_of(x, maa, cu_seqlens) | ctx.left | of_sums, x if left is None else torch.empty_like(x)
        ends, stats = x.new_empty(sizes["sequences"], x.shape[2]), x.new_empty(sizes["tokens"], 2, dtype=torch.float32)
        outs = [] if bones else [torch.empty_like(x) for _ in range(whole + len(maa))]
        ctx.save_for_backward(total, last, weight, bias, maa, stats, cu_seqlens, *bones)
        ctx.whole, ctx.twice = whole, twice
        ctx.set_materialize_grads(False)  # of `ends`, which only a carried state uses
        norm = dict(stats=stats, weight=weight, bias=bias, maa=maa)
        tensors, of_norm = norm | dict(x=x, ends=ends) | _named("out", outs, whole), sizes | dict(n=len(outs) - whole)
        if left is not None:
            tensors |= dict(left_x=left, sum=total)
        shifts = [x.new_empty(sizes["tokens"], rank) for rank in ranks if rank is not None]
        tensors |= numbered("shift", shifts)
        call("norm_lerp_forward", x, tensors, last=last, eps=eps, strip=strip_of(sizes["tokens"]), **of_norm)
        if bones:
            outs, shifts = affine.bend(norm | dict(x=total), bones, last, sizes_of(x, maa, cu_seqlens))
        again = [] if twice is None else [outs[whole + twice].detach()]
        if bones and not any(ctx.needs_input_grad[:2]):  # the first block's, where the embedding is frozen
            ctx.mark_non_differentiable(total, ends, *again, *(out for out, bone in zip(outs, bones) if bone is None))
        return total, ends, *outs, *again, *shifts

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, passed: Tensor | None, gends: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, last, weight, bias, maa, stats, cu_seqlens, *bones = ctx.saved_tensors
        count = ctx.whole + len(maa) + (ctx.twice is not None)
        passed, *given = with_zeros((passed, *grads[:count]), x)
        sizes = sizes_of(x, maa, cu_seqlens)
        gbones: list[Tensor | None] = []
        if bones:
            norm, trained = dict(x=x, stats=stats, weight=weight, bias=bias, maa=maa), any(ctx.needs_input_grad[11:])
            bent = bones, given[: len(maa)], grads[count:]
            given[: len(maa)], gbones = affine.bend_back(norm, *bent, trained, last, sizes)
            if not any(ctx.needs_input_grad[:2]):
                return *11 * (None,), *gbones
        sizes |= ctx.left | asked.sizes_of(ctx.ranks)
        gx, glast, gleft = torch.empty_like(x), room_like(last), None
        if ctx.left:
            gleft = x.new_empty(sizes["tokens"], ctx.left["shard"])
        tensors = dict(sum=x, passed=passed, stats=stats, gends=gends, weight=weight, maa=maa, gx=gx, gleft_x=gleft)
        tensors |= _named("grad", given, ctx.whole) | asked.gradients(ctx.ranks, grads[count:])
        n = len(given) - ctx.whole
        sizes |= dict(n=n, last_point=n - 1 if ctx.twice is None else ctx.twice, strip=strip_of(sizes["tokens"]))
        call("norm_lerp_backward", x, tensors, glast=glast, **sizes)
        gleft = None if gleft is None else gleft.expand(ctx.left["parts"], -1, -1)
        return gx, glast, *7 * (None,), gleft, None, *gbones


def _named(kind: str, tensors: Sequence[Tensor], whole: bool) -> dict[str, Tensor]:
    """The norm's, where it is the first, as `kind`, and the points' as kind0, kind1, …"""
    points = numbered(kind, tensors[whole:])
    return {kind: tensors[0], **points} if whole else points


def strip_of(tokens: int) -> int:
    """Tokens of a block."""
    return max(1, min(MOST_STRIP, tokens // STRIPS))


def _rows(x: Tensor) -> dict[str, int]:
    return dict(tokens=x[..., 0].numel(), channels=x.shape[-1])
