"""The mix operations on the CPU that take elements, or rows, one by one: autograd Functions over cpu/mix.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

import ctypes

import torch
from torch.autograd import Function

from ..native.arguments import fill
from .library import (
    LerpArguments,
    ReluSquareArguments,
    SigmoidGateArguments,
    ValueResidualArguments,
    differentiable_once,
    library,
    rounded,
    sums_like,
)


def _table(tensors):
    """A table of tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


class Lerp(Function):
    """x (B, T, C), last (n, C) or None, maa (m, C), low (B, T, m K) and up (m, K, C) or None, cu_seqlens int64 or None
    -> m times (B, T, C)."""

    @staticmethod
    def forward(ctx, x, last, maa, low, up, cu_seqlens):
        ctx.save_for_backward(x, last, maa, low, up, cu_seqlens)
        outs = tuple(torch.empty_like(x) for _ in range(maa.shape[0]))
        tensors = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens)
        table = _table(outs)
        library().mix_lerp_forward(_lerp(tensors, outs=ctypes.addressof(table)))
        return outs

    @staticmethod
    @differentiable_once
    def backward(ctx, *grads):
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
        library().mix_lerp_backward(_lerp(tensors, grads=ctypes.addressof(table)))
        gmaa, gup = rounded((gmaa, gup), x.dtype)
        return gx, glast, gmaa, glow, gup, None


def _lerp(tensors, **tables):
    x, up, cu_seqlens = tensors["x"], tensors["up"], tensors["cu_seqlens"]
    B, T, C = x.shape
    return fill(
        LerpArguments,
        x,
        tensors,
        n=tensors["maa"].shape[0],
        tokens=B * T,
        channels=C,
        rank=0 if up is None else up.shape[1],
        sequences=B if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        **tables,
    )


class ReluSquare(Function):
    """x -> max(x, 0)². Backward needs the result alone, which a linear layer after it may keep in any case."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        ctx.save_for_backward(out)
        library().mix_relu_square_forward(fill(ReluSquareArguments, x, dict(x=x, out=out), count=x.numel()))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        gx = torch.empty_like(out)
        arguments = fill(ReluSquareArguments, out, dict(out=out, grad=grad, gx=gx), count=out.numel())
        library().mix_relu_square_backward(arguments)
        return gx


class SigmoidGate(Function):
    """r, v of one shape -> sigmoid(r) v."""

    @staticmethod
    def forward(ctx, r, v):
        ctx.save_for_backward(r, v)
        out = torch.empty_like(v)
        library().mix_sigmoid_gate_forward(fill(SigmoidGateArguments, v, dict(r=r, v=v, out=out), count=v.numel()))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        r, v = ctx.saved_tensors
        gr, gv = torch.empty_like(r), torch.empty_like(v)
        tensors = dict(r=r, v=v, grad=grad, gr=gr, gv=gv)
        library().mix_sigmoid_gate_backward(fill(SigmoidGateArguments, v, tensors, count=v.numel()))
        return gr, gv


class ValueResidual(Function):
    """v, first, low (B, T, C), v0 of C elements -> v + (first - v) sigmoid(v0 + low)."""

    @staticmethod
    def forward(ctx, v, first, low, v0):
        ctx.save_for_backward(v, first, low, v0)
        out = torch.empty_like(v)
        library().mix_value_residual_forward(_value_residual(dict(v=v, first=first, low=low, v0=v0, out=out)))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        v, first, low, v0 = ctx.saved_tensors
        gv, gfirst, glow = (torch.empty_like(v) for _ in range(3))
        sums = sums_like([v0], ctx.needs_input_grad[3])
        tensors = dict(v=v, first=first, low=low, v0=v0, grad=grad, gv=gv, gfirst=gfirst, glow=glow, gv0=sums[0])
        library().mix_value_residual_backward(_value_residual(tensors))
        return gv, gfirst, glow, *rounded(sums, v.dtype)


def _value_residual(tensors):
    v = tensors["v"]
    return fill(ValueResidualArguments, v, tensors, tokens=v.shape[:-1].numel(), channels=v.shape[-1])
