"""Residual and layer norm in one, on a GPU: an autograd Function over cuda/mix/layer_norm.cuh.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import call, differentiable_once, rounded, sums_like


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


def _rows(x: Tensor) -> dict[str, int]:
    return dict(tokens=x[..., 0].numel(), channels=x.shape[-1])
