"""Token shift with interpolation on the CPU, including the weights' low-rank product: an autograd Function over
cpu/mix/lerp.h.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import call, differentiable_once, rounded


def _table(tensors: Sequence[Tensor]) -> ctypes.Array:
    """A C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


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
        tensors = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens)
        table = _table(outs)
        call("lerp_forward", x, tensors, outs=ctypes.addressof(table), **_sizes(x, maa, up, cu_seqlens))
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
        tensors = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens)
        tensors |= dict(gx=gx, glast=glast, gmaa=gmaa, glow=glow, gup=gup)
        table = _table(grads)
        call("lerp_backward", x, tensors, grads=ctypes.addressof(table), **_sizes(x, maa, up, cu_seqlens))
        gmaa, gup = rounded((gmaa, gup), x.dtype)
        return gx, glast, gmaa, glow, gup, None


def _sizes(x: Tensor, maa: Tensor, up: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, int]:
    B, T, C = x.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return dict(n=maa.shape[0], tokens=B * T, channels=C, rank=0 if up is None else up.shape[1], sequences=sequences)
