"""Token shift with interpolation on a GPU, where the weights' product of low rank is a matrix product outside the
kernel: an autograd Function like cpu.Lerp, over cuda/mix/lerp.cuh."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import call, differentiable_once, rounded


class Lerp(Function):
    """x (B, T, C), last (n, C) or None, maa (m, C), low (B, T, m K) and up (m, K, C) or None, cu_seqlens int64 or None
    -> m times (B, T, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: Tensor | None, maa: Tensor, low, up, cu_seqlens) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, last, maa, low, up, cu_seqlens)
        outs = tuple(torch.empty_like(x) for _ in range(maa.shape[0]))
        tensors = dict(x=x, offsets=offsets(low, up), maa=maa) | {f"out{i}": out for i, out in enumerate(outs)}
        call("lerp_forward", x, tensors, last=last, **_sizes(x, maa, cu_seqlens))
        return outs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, maa, low, up, cu_seqlens = ctx.saved_tensors
        gx, glast = torch.empty_like(x), None if last is None else torch.empty_like(last)
        goffsets = None if low is None else x.new_empty(maa.shape[0], x[..., 0].numel(), x.shape[2])
        gmaa = torch.empty_like(maa, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        tensors = dict(x=x, offsets=offsets(low, up), maa=maa, gx=gx, goffsets=goffsets)
        tensors |= {f"grad{i}": grad for i, grad in enumerate(grads)}
        tensors |= {} if gmaa is None else {f"gmaa{i}": row for i, row in enumerate(gmaa)}
        call("lerp_backward", x, tensors, last=last, glast=glast, **_sizes(x, maa, cu_seqlens))
        glow = gup = None
        if goffsets is not None:
            glow = (goffsets @ up.mT).transpose(0, 1).reshape(low.shape)
            gup = _by_point(low, up).mT @ goffsets
        return gx, glast, *rounded([gmaa], x.dtype), glow, gup, None


def offsets(low: Tensor | None, up: Tensor | None) -> Tensor | None:
    """low_i up_i: (B, T, m K), (m, K, C) -> (m, B T, C); None where they are."""
    return None if low is None or up is None else _by_point(low, up) @ up


def _by_point(low: Tensor, up: Tensor) -> Tensor:
    """low as (m, B T, K)."""
    m, K, _ = up.shape
    return low.reshape(-1, m, K).transpose(0, 1)


def _sizes(x: Tensor, maa: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
    B, T, C = x.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return dict(tokens=B * T, channels=C, n=maa.shape[0], length=T, sequences=sequences, bounds=cu_seqlens)
