"""Layer norm and token shift with interpolation in one pass: an autograd Function over cuda/mix/norm_lerp.cuh, for
frozen parameters. It returns its input too, for the residual, so that its kernel adds both gradients in backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..ops.mix.functions import call, differentiable_once, numbered, room_like, run, with_zeros
from ..ops.mix.gpu_lerp import sizes_of
from ..ops.mix.op import check_shift
from ..ops.native.arguments import aligned

STRIPS, MOST_STRIP = 1024, 8  # blocks that fill any GPU; most tokens of one block


def norm_lerp(
    norm: nn.LayerNorm, x: Tensor, last: Tensor | None, maa: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`lerp` of norm(x): x (B, T, C), last, maa (m, C) and cu_seqlens as in lerp -> x for the residual, the last
    normalized token of each sequence (B, C), m points (B, T, C)."""
    check_shift(x, last, cu_seqlens)
    x, ends, *points = run(NormLerp, *contiguous(x, last, norm.weight, norm.bias, maa), norm.eps, bounds_of(cu_seqlens))
    return x, ends, points


def contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    """Tensors, or None, as the kernels read them: contiguous, and aligned to 16 bytes."""
    return (None if x is None else aligned(x.contiguous()) for x in tensors)


def bounds_of(cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens as the kernels read it."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


class NormLerp(Function):
    """x (B, T, C), last (n, C) or None, weight and bias (C,), maa (m, C), none of them trained, eps, cu_seqlens int64
    or None -> x, the last of each sequence's norms (n, C), m times (B, T, C)."""

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
    ) -> tuple[Tensor, ...]:
        sizes = sizes_of(x, maa, cu_seqlens)
        ends, stats = x.new_empty(sizes["sequences"], x.shape[2]), x.new_empty(sizes["tokens"], 2, dtype=torch.float32)
        outs = [torch.empty_like(x) for _ in maa]
        ctx.save_for_backward(x, last, weight, maa, stats, cu_seqlens)
        ctx.set_materialize_grads(False)  # only a carried state gives `ends` a gradient
        tensors = dict(x=x, ends=ends, stats=stats, weight=weight, bias=bias, maa=maa) | numbered("out", outs)
        call("norm_lerp_forward", x, tensors, last=last, eps=eps, strip=strip_of(sizes["tokens"]), **sizes)
        return x, ends, *outs

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, passed: Tensor | None, gends: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, last, weight, maa, stats, cu_seqlens = ctx.saved_tensors
        passed, *points = with_zeros((passed, *grads), x)
        gx, glast, sizes = torch.empty_like(x), room_like(last), sizes_of(x, maa, cu_seqlens)
        tensors = dict(x=x, passed=passed, stats=stats, gends=aligned(gends), weight=weight, maa=maa, gx=gx)
        tensors |= numbered("grad", points)
        call("norm_lerp_backward", x, tensors, glast=glast, strip=strip_of(sizes["tokens"]), **sizes)
        return gx, glast, *5 * (None,)


def strip_of(tokens: int) -> int:
    """The number of tokens that one block takes."""
    return max(1, min(MOST_STRIP, tokens // STRIPS))
