"""Layer norm and RWKV-6's data-dependent token shift: an autograd Function over cuda/mix/norm_lerp.cuh and
low_rank.cuh, for frozen parameters.

Neither the normalized input nor the decay's point is ever in memory: the norm's kernel gives the point that the
weights depend on, and the kernel of the other points normalizes again with the same statistics.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..ops.mix.functions import call, differentiable_once, numbered, room_like, run, with_zeros
from ..ops.mix.gpu_lerp import group_size, parts_like, sizes_of
from ..ops.mix.op import check_shift
from ..ops.native.arguments import aligned
from .norm_lerp import bounds_of, contiguous, strip_of


def norm_ddlerp(
    norm: nn.LayerNorm, x: Tensor, last: Tensor | None, factors: tuple[Tensor, ...], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """RWKV-6's token shift of norm(x) (Peng et al. 2024, arXiv 2404.05892, eq. 12 to 14): five `lerp` points, whose
    weights have the low-rank factor tanh(p w1), p being the point of maa_x. The first point is returned only as the
    decay's low-rank factor, tanh(first decay_w1).

    x (B, T, C), last and cu_seqlens as in lerp; factors: maa_x (1, C), w1 (C, 5 K), maa (5, C), w2 (5, K, C), decay_w1
    (C, 2 K) -> x for the residual, the last normalized token of each sequence (B, C), the decay's factor (B, T, 2 K),
    the other four points (B, T, C).
    """
    check_shift(x, last, cu_seqlens)
    tensors = contiguous(last, x, norm.weight, norm.bias, *factors)
    x, ends, low, *points = run(NormDDLerp, norm.eps, bounds_of(cu_seqlens), *tensors)
    return x, ends, low, points


class NormDDLerp(Function):
    """eps, cu_seqlens int64 or None, last (n, C) or None, x (B, T, C); weight and bias (C,), maa_x (1, C), w1 (C, 5 K),
    maa (5, C), w2 (5, K, C) and decay_w1 (C, 2 K), none of them trained -> x, the last of each sequence's norms (n, C),
    the decay's factor (B, T, 2 K), four points (B, T, C)."""

    @staticmethod
    def forward(
        ctx: Any, eps: float, cu_seqlens: Tensor | None, last: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        x, weight, bias, maa_x, w1, maa, w2, decay_w1 = tensors
        sizes = sizes_of(x, maa_x, cu_seqlens)
        mixed, ends = torch.empty_like(x), x.new_empty(sizes["sequences"], x.shape[2])
        stats = x.new_empty(sizes["tokens"], 2, dtype=torch.float32)
        norm = dict(x=x, weight=weight, bias=bias, stats=stats)
        given = norm | dict(maa=maa_x, ends=ends, out0=mixed)
        call("norm_lerp_forward", x, given, last=last, eps=eps, strip=strip_of(len(stats)), **sizes)
        low, decay = mixed @ w1, x.new_empty(*x.shape[:2], decay_w1.shape[1])
        parts, points = parts_like(decay, x, torch.float32), [torch.empty_like(x) for _ in maa[1:]]
        given = norm | dict(maa=maa, low=low, up=w2, down=decay_w1, parts=parts) | numbered("out", points, 1)
        call("lerp_low_forward", x, given, last=last, size=group_size(x), **sizes_of(x, maa, cu_seqlens))
        call("tanh_forward", decay, dict(parts=parts, out=decay), **_rows_of(parts))
        ctx.set_materialize_grads(False)  # only a carried state gives `ends` a gradient
        ctx.save_for_backward(cu_seqlens, last, *tensors, stats, low, decay)
        return x, ends, decay, *points

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, passed: Tensor | None, gends: Tensor | None, gdecay: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        cu_seqlens, last, x, weight, bias, maa_x, w1, maa, w2, decay_w1, stats, low, decay = ctx.saved_tensors
        passed, *points = with_zeros((passed, *grads), x)
        (gdecay,) = with_zeros([gdecay], decay)
        norm = dict(x=x, weight=weight, bias=bias, stats=stats)
        gnormal, glow, glast, more = torch.empty_like(x), torch.empty_like(low), room_like(last), room_like(last)
        parts = parts_like(low, x)
        tensors = norm | dict(maa=maa, low=low, up=w2, down=decay_w1, decay=decay, gdecay=gdecay)
        tensors |= dict(gx=gnormal, glow=parts) | numbered("grad", points, 1)
        sizes = sizes_of(x, maa, cu_seqlens) | dict(last=last, size=group_size(x))
        call("lerp_low_backward", x, tensors, glast=glast, **sizes)
        call("tanh_backward", low, dict(x=low, parts=parts, gx=glow), **_rows_of(parts))
        gx = torch.empty_like(x)
        tensors = norm | dict(maa=maa_x, gx=gx, grad=gnormal, passed=passed, gends=aligned(gends), grad0=glow @ w1.mT)
        sizes = sizes_of(x, maa_x, cu_seqlens)
        call("norm_lerp_backward", x, tensors, glast=more, strip=strip_of(len(stats)), **sizes)
        glast = glast if glast is None or more is None else glast.add_(more)
        return None, None, glast, gx, *7 * (None,)


def _rows_of(parts: Tensor) -> dict[str, int]:
    """The sizes of parts (n, B, T, …) that a kernel needs."""
    return dict(n=len(parts), tokens=parts[0, ..., 0].numel(), channels=parts.shape[-1])
