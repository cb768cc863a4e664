"""The base of evaluations without a merged weight: autograd Functions over the flattened tokens.

Each method's function computes y = x W'ᵀ + bias for x (..., in), with a hand-derived backward that saves the least.
None saves a tensor of the weight's size besides the weight itself, which may be frozen or trainable, dense or quantized
(see product.py); x too may need no gradient. Under autocast activations and adapter parameters are cast to its dtype;
the weight is cast for the time of one product. Gradients of gradients are not defined.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...ops.bone import cpu as kernels
from ...ops.products import matmul
from ..product import Frozen, Product


def linear(x: Tensor, base: Frozen) -> Tensor:
    """The layer without an adapter. Unlike F.linear it keeps no cast or dequantized weight for backward."""
    return apply_to_tokens(_Linear, x, base)


def apply_to_tokens(
    function: type[Function], x: Tensor, base: Frozen, *params: Tensor, extra: tuple[Any, ...] = ()
) -> Tensor:
    """Apply an autograd Function over the flattened tokens of x, in one dtype."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return apply_to_tokens(function, x, base, *params, extra=extra)
    params = tuple(param.to(x.dtype) for param in params)
    y: Tensor = function.apply(flat(x), base.weight, base.bias, *params, base.product, *extra)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def flat(x: Tensor) -> Tensor:
    """(..., n) -> (T, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ x: g (T, out), x (T, in) -> (out, in)."""
    return matmul(kernels.transposed(g), x)


def of_weight_and_bias(ctx: Any, g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a product's weight and bias, a Function's second and third inputs, if they are wanted: g (T,
    out), the input x (T, in), which is read for the weight alone."""
    need_weight, need_bias = ctx.needs_input_grad[1:3]
    return weight_gradient(g, x).to(weight.dtype) if need_weight else None, g.sum(0) if need_bias else None


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        return ctx.product.backward(g, weight) if need_x else None, *of_weight_and_bias(ctx, g, x, weight), None
