"""Adding a residual to a linear layer's result: on a GPU inside the layer's product.

There the product reads the residual where it lies, so that neither a launch nor a pass over the sum is left, and the
layer norm that follows reads one tensor. So torch does it from 2.15 on; before, it copies the residual into its result
first, which takes as long as what is spared. A CPU adds to a result that its cache still has.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def inside_product(x: Tensor, residual: Tensor) -> bool:
    """Whether a product of x adds a residual itself: the one place that decides. Where the product is of another dtype,
    as under autocast, it would round the residual."""
    return not x.is_cpu and x.dtype == residual.dtype and not autocasts(x)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def added(y: Tensor, residual: Tensor | None) -> Tensor:
    """y + residual, for tensors of one shape; y where there is no residual."""
    return y if residual is None else y + residual


def linear(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """x weightᵀ + residual: x (..., in), weight (out, in), residual (..., out) -> (..., out)."""
    if not inside_product(x, residual):
        return added(F.linear(x, weight), residual)
    tokens, rows = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
    y = _Linear.apply(tokens, weight, rows) if torch.is_grad_enabled() else torch.addmm(rows, tokens, weight.t())
    return y.view(residual.shape)


class _Linear(Function):
    """x (T, in), weight (out, in), residual (T, out) -> (T, out). Keeps the weight as it is, and no view of it, which
    under ZeRO-3 would outlive its gathering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return torch.addmm(residual, x, weight.t())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_residual = ctx.needs_input_grad
        return (g @ weight if need_x else None, g.t() @ x if need_weight else None, g if need_residual else None)
