"""Token shift with interpolation on the CPU, including the weights' low-rank product: an autograd Function over
cpu/mix/lerp.h.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import compute, differentiable_once, numbered, rounded


class Lerp(Function):
    """x (B, T, C), last (n, C), maa (m, C), low (B, T, m K), up (m, K, C), cu_seqlens int64 -> m times (B, T, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        last: Tensor | None,
        maa: Tensor,
        low: Tensor | None,
        up: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, last, maa, low, up, cu_seqlens)
        outs = tuple(torch.empty_like(x) for _ in range(maa.shape[0]))
        read = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens)
        compute("lerp_forward", read, numbered("out", outs), **_sizes(x, maa, up, cu_seqlens))
        return outs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, maa, low, up, cu_seqlens = ctx.saved_tensors
        need_x, need_last, need_maa, need_low, need_up = ctx.needs_input_grad[:5]
        gx = torch.empty_like(x) if need_x else None
        glast = torch.zeros_like(last) if need_last else None
        gmaa = torch.empty_like(maa, dtype=torch.float32) if need_maa else None
        glow = torch.empty_like(low) if need_low else None
        gup = torch.empty_like(up, dtype=torch.float32) if need_up else None
        read = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens) | numbered("grad", grads)
        written = dict(gx=gx, glast=glast, gmaa=gmaa, glow=glow, gup=gup)
        compute("lerp_backward", read, written, **_sizes(x, maa, up, cu_seqlens))
        gmaa, gup = rounded((gmaa, gup), x.dtype)
        return gx, glast, gmaa, glow, gup, None


def _sizes(x: Tensor, maa: Tensor, up: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, int]:
    B, T, C = x.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return dict(n=maa.shape[0], tokens=B * T, channels=C, rank=0 if up is None else up.shape[1], sequences=sequences)
