"""Layer norm and RWKV-6's token shift, whose weights depend on the token, on a GPU: an autograd Function over
cuda/mix/norm_lerp.cuh and low_rank.cuh.

Neither what is normalized nor the decay's point is ever in memory: a norm's kernel gives the point that makes the
weights' factor, and the kernel of the other points normalizes again, by the same statistics.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..native.launch import aligned
from . import affine, asked, cuda, lefts
from .functions import call, differentiable_once, numbered, room_like, with_zeros
from .gpu_lerp import group_size, has_product_inside, parts_like, sizes_of
from .norms import strip_of


class NormDDLerp(Function):
    """x (B, T, C), y and gate (B, T, C) or None, last (n, C) or None; weight and bias (C,), maa_x (1, C), w1 (C, 5 K),
    maa (5, C), w2 (5, K, C) and decay_w1 (C, 2 K), none of them trained; eps, cu_seqlens int64 or None, what was left
    of y and gate (parts, B T, r) or None each; of each of four points the rank of its sum over shards, or None, or
    nothing at all, and the same of matrices (C/r, r, r) that bend it -> the sum, the last of each sequence's norms
    (n, C), the decay's factor (B, T, 2 K), four points (B, T, C), the sums over shards (T, r) of those that are bent or
    have a rank."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        last: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        maa_x: Tensor,
        w1: Tensor,
        maa: Tensor,
        w2: Tensor,
        decay_w1: Tensor,
        eps: float,
        cu_seqlens: Tensor | None,
        left_y: Tensor | None,
        left_gate: Tensor | None,
        ranks: Sequence[int | None],
        *bones: Tensor | None,
    ) -> tuple[Tensor, ...]:
        sizes = sizes_of(x, maa_x, cu_seqlens) | lefts.sizes_of(left_y, left_gate)
        mixed, ends = torch.empty_like(x), x.new_empty(sizes["sequences"], x.shape[2])
        stats = x.new_empty(sizes["tokens"], 2, dtype=torch.float32)
        total = x if gate is None else torch.empty_like(x)
        norm = dict(weight=weight, bias=bias, stats=stats)
        tensors = norm | dict(x=x, y=y, gate=gate, sum=None if gate is None else total)
        tensors |= dict(left_y=left_y, left_gate=left_gate, maa=maa_x, ends=ends, out0=mixed)
        call("norm_lerp_forward", x, tensors, last=last, eps=eps, strip=strip_of(len(stats)), **sizes)
        low, decay = mixed @ w1, x.new_empty(*x.shape[:2], decay_w1.shape[1])
        of_points = norm | dict(x=total, maa=maa, low=low, up=w2, down=decay_w1)
        shifts: list[Tensor] = []
        if bones or ranks:
            wanted, of_all = (None, *(bones or ranks)), sizes_of(x, maa, cu_seqlens)
            parts = affine.parts_of(x, wanted, decay_w1)
            points, shifts = affine.bend(of_points, wanted, last, of_all, parts)
        else:
            parts, points = parts_like(decay, x, torch.float32), [torch.empty_like(x) for _ in maa[1:]]
            of_points |= dict(parts=parts) | numbered("out", points, 1)
            call("lerp_low_forward", x, of_points, last=last, **_low_sizes(x, maa, w2, cu_seqlens))
        call("tanh_forward", decay, dict(parts=parts, out=decay), **_rows_of(parts))
        ctx.ranks = (None, *ranks)
        ctx.set_materialize_grads(False)  # of `ends`, which only a carried state uses
        kept = y, gate, left_y, left_gate, last, weight, bias, maa_x, w1, maa, w2, decay_w1, cu_seqlens
        ctx.save_for_backward(total, *kept, stats, low, decay, *bones)
        if bones and not any(ctx.needs_input_grad[:4]):  # the first block's, where the embedding is frozen
            ctx.mark_non_differentiable(total, ends, decay, *(x for x, bone in zip(points, bones) if bone is None))
        return total, ends, decay, *points, *shifts

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, passed: Tensor | None, gends: Tensor | None, gdecay: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, y, gate, left_y, left_gate, last, weight, bias, *others = ctx.saved_tensors
        maa_x, w1, maa, w2, decay_w1, cu_seqlens, stats, low, decay, *bones = others
        passed, *points = with_zeros((passed, *grads[: len(maa) - 1]), x)
        gshifts = grads[len(maa) - 1 :]
        (gdecay,) = with_zeros([gdecay], decay)
        norm = dict(weight=weight, bias=bias, stats=stats)
        gbones: list[Tensor | None] = []
        if bones:
            of_points, trained = norm | dict(x=x, maa=maa, low=low, up=w2), any(ctx.needs_input_grad[16:])
            given = (None, *bones), (x, *points), gshifts, trained, last
            (_, *points), (_, *gbones) = affine.bend_back(of_points, *given, sizes_of(x, maa, cu_seqlens))
            if not any(ctx.needs_input_grad[:4]):
                return *16 * (None,), *gbones
        gnormal, glow, glast, more = torch.empty_like(x), torch.empty_like(low), room_like(last), room_like(last)
        parts = parts_like(low, x)
        tensors = norm | dict(x=x, maa=maa, low=low, up=w2, down=decay_w1, decay=decay, gdecay=gdecay)
        tensors |= dict(gx=gnormal, glow=parts) | numbered("grad", map(aligned, points), 1)
        sizes = _low_sizes(x, maa, w2, cu_seqlens) | asked.sizes_of(ctx.ranks)
        tensors |= asked.gradients(ctx.ranks, [aligned(gshift) for gshift in gshifts])
        call("lerp_low_backward", x, tensors, last=last, glast=glast, **sizes)
        call("tanh_backward", low, dict(x=low, parts=parts, gx=glow), **_rows_of(parts))
        gx, gy, ggate = torch.empty_like(x), room_like(y), room_like(gate)
        gleft_y, gleft_gate = lefts.room_for(left_y), lefts.room_for(left_gate)
        tensors = norm | dict(sum=x, y=y, gate=gate, gx=gx, gy=gy, ggate=ggate)
        tensors |= dict(left_y=left_y, left_gate=left_gate, gleft_y=gleft_y, gleft_gate=gleft_gate)
        tensors |= dict(maa=maa_x, grad=gnormal, passed=passed, gends=gends, grad0=glow @ w1.mT)
        sizes = sizes_of(x, maa_x, cu_seqlens) | lefts.sizes_of(left_y, left_gate) | dict(strip=strip_of(len(stats)))
        call("norm_lerp_backward", x, tensors, glast=more, **sizes)
        glast = glast if glast is None or more is None else glast.add_(more)
        gradients = lefts.gradient(gleft_y, left_y), lefts.gradient(gleft_gate, left_gate)
        return gx, gy, ggate, glast, *9 * (None,), *gradients, None, *gbones


def takes(
    x: Tensor,
    last: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    maa_x: Tensor,
    w1: Tensor,
    maa: Tensor,
    w2: Tensor,
    decay_w1: Tensor,
) -> bool:
    """Whether the kernels are for such shapes: a decay's factor twice as wide as a point's, and whole tiles."""
    return (
        x.shape[2] <= cuda.MOST_MIXED
        and decay_w1.shape[1] == 2 * w2.shape[1]
        and has_product_inside(x, last, maa, None, w2, weight, bias, decay_w1)
    )


def _low_sizes(x: Tensor, maa: Tensor, w2: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
    return sizes_of(x, maa, cu_seqlens) | dict(rank=w2.shape[1], size=group_size(x))


def _rows_of(parts: Tensor) -> dict[str, int]:
    """What a launch is told of parts (n, B, T, …)."""
    return dict(n=len(parts), tokens=parts[0, ..., 0].numel(), channels=parts.shape[-1])
