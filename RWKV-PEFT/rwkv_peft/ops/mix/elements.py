"""The elementwise mix operations: autograd Functions over cpu/mix and cuda/mix.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import call, differentiable_once, rounded, rows_of, sums_like


class ReluSquare(Function):
    """x -> max(x, 0)². Backward needs only the result, which a linear layer after it may keep in any case."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ctx.save_for_backward(out)
        call("relu_square_forward", x, dict(x=x, out=out), **rows_of(x))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        gx = torch.empty_like(out)
        call("relu_square_backward", out, dict(out=out, grad=grad, gx=gx), **rows_of(out))
        return gx


class SigmoidGate(Function):
    """r, v of one shape -> sigmoid(r) v."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(r, v)
        out = torch.empty_like(v)
        call("sigmoid_gate_forward", v, dict(r=r, v=v, out=out), **rows_of(v))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        r, v = ctx.saved_tensors
        gr, gv = torch.empty_like(r), torch.empty_like(v)
        call("sigmoid_gate_backward", v, dict(r=r, v=v, grad=grad, gr=gr, gv=gv), **rows_of(v))
        return gr, gv


class ValueResidual(Function):
    """v, first, low (B, T, C), v0 of C elements -> v + (first - v) sigmoid(v0 + low)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, first: Tensor, low: Tensor, v0: Tensor) -> Tensor:
        ctx.save_for_backward(v, first, low, v0)
        out = torch.empty_like(v)
        call("value_residual_forward", v, dict(v=v, first=first, low=low, v0=v0, out=out), **rows_of(v))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, first, low, v0 = ctx.saved_tensors
        gv, gfirst, glow = (torch.empty_like(v) for _ in range(3))
        sums = sums_like([v0], ctx.needs_input_grad[3])
        tensors = dict(v=v, first=first, low=low, v0=v0, grad=grad, gv=gv, gfirst=gfirst, glow=glow, gv0=sums[0])
        call("value_residual_backward", v, tensors, **rows_of(v))
        return gv, gfirst, glow, *rounded(sums, v.dtype)
