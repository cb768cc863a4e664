"""A change of low rank, scale B A, which is multiplied from the right and never formed."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...ops.products import matmul, scaled_product
from ..product import Frozen, Product
from .tokens import apply_to_tokens, of_weight_and_bias


def lora(x: Tensor, base: Frozen, lora_A: Tensor, lora_B: Tensor, scale: float = 1.0) -> Tensor:
    """Low rank: W' = W + scale B A.

    x (..., in), lora_A (r, in), lora_B (out, r) -> (..., out).
    """
    return apply_to_tokens(_Lora, x, base, lora_A, lora_B, extra=(scale,))


class _Lora(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        product: Product,
        scale: float,
    ) -> Tensor:
        inner = matmul(x, lora_A.t())  # (T, r)
        ctx.product, ctx.scale = product, scale
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None,
            weight,
            lora_A,
            lora_B,
            inner if ctx.needs_input_grad[4] else None,
        )
        y = scaled_product(inner, lora_B.t(), scale)
        product.add_forward_(y, x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, inner = ctx.saved_tensors
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        g_inner = scaled_product(g, lora_B, ctx.scale) if need_x or need_A else None  # (T, r)
        dx = None
        if need_x and g_inner is not None:
            dx = matmul(g_inner, lora_A)
            ctx.product.add_backward_(dx, g, weight)
        return (
            dx,
            *of_weight_and_bias(ctx, g, x, weight),
            matmul(g_inner.t(), x) if need_A and g_inner is not None else None,
            scaled_product(g.t(), inner, ctx.scale) if need_B else None,
            None,
            None,
        )
