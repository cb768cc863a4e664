"""bat-in: Bone in its block affine form by input block, evaluated on the activations.

With u_b = B_b x_b, y = W (x + u) + tile(Σ_b u_b): the merged weight is never formed, x alone is saved for the backward
pass, and a quantized weight serves as it is.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...ops.bone import affine, affine_backward_, plus_tiled
from ..product import Frozen, Product
from .tokens import apply_to_tokens, weight_gradient


def bat_in(x: Tensor, base: Frozen, bone: Tensor) -> Tensor:
    """Block affine by input block: W'_ab = W_ab + W_ab B_b + B_b.

    x (..., in), bone (in/r, r, r) -> (..., out) in x's dtype.
    r must divide in and out. Costs 4 T in out + 6 T in r FLOPs forward and backward.
    """
    return apply_to_tokens(_BatIn, x, base, bone)


class _BatIn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bone: Tensor, product: Product) -> Tensor:
        ctx.product = product
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_x else None, weight, bone)
        z, shift = affine(x, bone)
        return tiled_product(z, shift, weight, bias, product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bone = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad[:4]
        dx = d_weight = d_bone = None
        if need_weight:
            d_weight = weight_gradient(g, affine(x, bone)[0]).to(weight.dtype)
        if need_x or need_bone:
            dx = ctx.product.backward(g, weight)  # holds dz, and becomes dx a few tokens at a time
            d_bone = affine_backward_(dx, g, x if need_bone else None, bone)
        return dx if need_x else None, d_weight, g.sum(0) if need_bias else None, d_bone, None


def tiled_product(z: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """W z + bias + tile(shift), without gradients: z (T, in), shift as `affine` gives it -> (T, out)."""
    return plus_tiled(
        shift,
        product.shape(weight)[0],
        lambda: product.forward(z, weight, bias),
        lambda y: product.add_forward_(y, z, weight, bias),
    )
