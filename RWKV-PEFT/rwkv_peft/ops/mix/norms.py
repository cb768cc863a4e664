"""Residual and layer norm in one, with token shift and interpolation or without, on a GPU: autograd Functions over
cuda/mix/layer_norm.cuh and norm_lerp.cuh.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import call, differentiable_once, room_like, rounded, sums_like, with_zeros
from .gpu_lerp import sizes_of

STRIPS, MOST_STRIP = 1024, 8  # blocks that a GPU has enough of, whichever; tokens that one has at most


class AddNorm(Function):
    """x (B, T, C), y (B, T, C) or None, weight and bias (C,), eps -> x + y, layer norm of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        (total, tensors), out = summed(x, y), torch.empty_like(x)
        stats = x.new_empty(x[..., 0].numel(), 2, dtype=torch.float32)
        ctx.save_for_backward(total, weight, bias, stats)
        tensors |= dict(out=out, weight=weight, bias=bias, stats=stats)
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
    """x (B, T, C), y (B, T, C) or None, gate (B, T, C) or None, last (n, C) or None, weight and bias (C,), maa (m, C),
    none of them trained, eps, cu_seqlens int64 or None, whether the norm itself is wanted, the point that is wanted
    twice or None -> x + y or x + sigmoid(gate) y, the last of each sequence's norms (n, C), the norm where wanted, m or
    m + 1 times (B, T, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        last: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        maa: Tensor,
        eps: float,
        cu_seqlens: Tensor | None,
        whole: bool,
        twice: int | None,
    ) -> tuple[Tensor, ...]:
        total, tensors = summed(x, y, gate)
        sizes = sizes_of(x, maa, cu_seqlens)
        ends, stats = x.new_empty(sizes["sequences"], x.shape[2]), x.new_empty(sizes["tokens"], 2, dtype=torch.float32)
        outs = tuple(torch.empty_like(x) for _ in range(whole + len(maa)))
        ctx.save_for_backward(total, None if gate is None else y, gate, last, weight, maa, stats, cu_seqlens)
        ctx.whole, ctx.twice = whole, twice
        ctx.set_materialize_grads(False)  # of `ends`, which only a carried state uses
        tensors |= dict(stats=stats, ends=ends, weight=weight, bias=bias, maa=maa) | _named("out", outs, whole)
        call("norm_lerp_forward", x, tensors, last=last, eps=eps, strip=strip_of(sizes["tokens"]), **sizes)
        return total, ends, *outs, *(() if twice is None else [outs[whole + twice].detach()])

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, passed: Tensor | None, gends: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, y, gate, last, weight, maa, stats, cu_seqlens = ctx.saved_tensors
        passed, *given = with_zeros((passed, *grads), total)
        grads_of_sum, tensors = summed_backward(total, y, gate, ctx.needs_input_grad[1])
        glast = room_like(last)
        sizes = sizes_of(total, maa, cu_seqlens)
        tensors |= dict(passed=passed, stats=stats, gends=gends, weight=weight, maa=maa)
        tensors |= _named("grad", given, ctx.whole)
        n = len(given) - ctx.whole
        sizes |= dict(n=n, last_point=n - 1 if ctx.twice is None else ctx.twice, strip=strip_of(sizes["tokens"]))
        call("norm_lerp_backward", total, tensors, glast=glast, **sizes)
        return *grads_of_sum, glast, *7 * (None,)


def summed(x: Tensor, y: Tensor | None, gate: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Room for x + y or x + sigmoid(gate) y, x itself where y is None; and the tensors of it that a kernel's forward is
    given."""
    total = x if y is None else torch.empty_like(x)
    return total, dict(x=x, y=y, gate=gate, sum=None if y is None else total)


def summed_backward(
    total: Tensor, y: Tensor | None, gate: Tensor | None, added: bool
) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor | None]]:
    """Room for the gradients of what made that sum, x, y and gate, that of y being that of x where it was `added` as it
    is; and the tensors that a kernel's backward is given. y: where there is a gate."""
    gx, gy, ggate = torch.empty_like(total), room_like(gate), room_like(gate)
    tensors = dict(sum=total, y=y, gate=gate, gx=gx, gy=gy, ggate=ggate)
    return (gx, gx if gate is None and added else gy, ggate), tensors


def _named(kind: str, tensors: Sequence[Tensor], whole: bool) -> dict[str, Tensor]:
    """The norm's, where it is the first, as `kind`, and the points' as kind0, kind1, …"""
    points = {f"{kind}{i}": x for i, x in enumerate(tensors[whole:])}
    return {kind: tensors[0], **points} if whole else points


def strip_of(tokens: int) -> int:
    """Tokens of a block."""
    return max(1, min(MOST_STRIP, tokens // STRIPS))


def _rows(x: Tensor) -> dict[str, int]:
    return dict(tokens=x[..., 0].numel(), channels=x.shape[-1])
