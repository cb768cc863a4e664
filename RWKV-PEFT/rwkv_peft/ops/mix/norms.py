"""Residual and layer norm in one, with token shift and interpolation or without, on a GPU: autograd Functions over
cuda/mix/layer_norm.cuh and norm_lerp.cuh.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import call, differentiable_once, rounded, sums_like, with_zeros
from .gpu_lerp import sizes_of

STRIPS, MOST_STRIP = 1024, 8  # blocks that a GPU has enough of, whichever; tokens that one has at most


class AddNorm(Function):
    """x (B, T, C), y (B, T, C) or None, weight and bias (C,), eps -> x + y, layer norm of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, out = x if y is None else torch.empty_like(x), torch.empty_like(x)
        stats = x.new_empty(x[..., 0].numel(), 2, dtype=torch.float32)
        ctx.save_for_backward(total, weight, bias, stats)
        tensors = dict(x=x, y=y, sum=None if y is None else total, out=out, weight=weight, bias=bias, stats=stats)
        call("add_norm_forward", x, tensors, eps=eps, **_rows(x))
        return total, out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, passed: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, bias, stats = ctx.saved_tensors
        gx = torch.empty_like(total)
        tensors = dict(sum=total, grad=grad, passed=passed, stats=stats, weight=weight, gx=gx)
        call("add_norm_backward", total, tensors, **_rows(total))
        sums = sums_like((weight, bias), any(ctx.needs_input_grad[2:4]))
        if sums[0] is not None:
            tensors = dict(sum=total, grad=grad, stats=stats, gweight=sums[0], gbias=sums[1])
            call("add_norm_sums", total, tensors, **_rows(total))
        return gx, gx if ctx.needs_input_grad[1] else None, *rounded(sums, weight.dtype), None


class NormLerp(Function):
    """x (B, T, C), y (B, T, C) or None, last (n, C) or None, weight and bias (C,), maa (m, C), none of them trained,
    eps, cu_seqlens int64 or None, whether the norm itself is wanted, the point that is wanted twice or None -> x + y,
    the last of each sequence's norms (n, C), the norm where wanted, m or m + 1 times (B, T, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        last: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        maa: Tensor,
        eps: float,
        cu_seqlens: Tensor | None,
        whole: bool,
        twice: int | None,
    ) -> tuple[Tensor, ...]:
        total = x if y is None else torch.empty_like(x)
        sizes = sizes_of(x, maa, cu_seqlens)
        ends, stats = x.new_empty(sizes["sequences"], x.shape[2]), x.new_empty(sizes["tokens"], 2, dtype=torch.float32)
        outs = tuple(torch.empty_like(x) for _ in range(whole + len(maa)))
        ctx.save_for_backward(total, last, weight, maa, stats, cu_seqlens)
        ctx.whole, ctx.twice = whole, twice
        ctx.set_materialize_grads(False)  # of `ends`, which only a carried state uses
        tensors = dict(x=x, y=y, sum=None if y is None else total, stats=stats, ends=ends)
        tensors |= dict(weight=weight, bias=bias, maa=maa) | _named("out", outs, whole)
        call("norm_lerp_forward", x, tensors, last=last, eps=eps, strip=strip_of(sizes["tokens"]), **sizes)
        return total, ends, *outs, *(() if twice is None else [outs[whole + twice].detach()])

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, passed: Tensor | None, gends: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, last, weight, maa, stats, cu_seqlens = ctx.saved_tensors
        passed, *given = with_zeros((passed, *grads), total)
        gx, glast = torch.empty_like(total), None if last is None else torch.empty_like(last)
        sizes = sizes_of(total, maa, cu_seqlens)
        tensors = dict(sum=total, passed=passed, stats=stats, gends=gends, weight=weight, maa=maa, gx=gx)
        tensors |= _named("grad", given, ctx.whole)
        n = len(given) - ctx.whole
        sizes |= dict(n=n, last_point=n - 1 if ctx.twice is None else ctx.twice, strip=strip_of(sizes["tokens"]))
        call("norm_lerp_backward", total, tensors, glast=glast, **sizes)
        return gx, gx if ctx.needs_input_grad[1] else None, glast, *7 * (None,)


def _named(kind: str, tensors: Sequence[Tensor], whole: bool) -> dict[str, Tensor]:
    """The norm's, where it is the first, as `kind`, and the points' as kind0, kind1, …"""
    points = {f"{kind}{i}": x for i, x in enumerate(tensors[whole:])}
    return {kind: tensors[0], **points} if whole else points


def strip_of(tokens: int) -> int:
    """Tokens of a block."""
    return max(1, min(MOST_STRIP, tokens // STRIPS))


def _rows(x: Tensor) -> dict[str, int]:
    return dict(tokens=x[..., 0].numel(), channels=x.shape[-1])
