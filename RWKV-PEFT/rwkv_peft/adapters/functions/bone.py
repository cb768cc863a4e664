"""bone: dimension sharding (Kang and Yin 2024, arXiv 2409.15371, its later versions, as MiSS too), and its mini form.

Every shard of the input shares one small matrix: y = W x + Dᵀ Σ_b x_b, so that Σ_b x_b (T, rank) is all that the
backward pass of D needs.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...ops.bone import plus_tiled, shard_sum, split_shards
from ...ops.products import matmul
from ..product import Frozen, Product
from .tokens import apply_to_tokens, of_weight_and_bias


def bone(x: Tensor, base: Frozen, bone: Tensor) -> Tensor:
    """Dimension sharding: W'[o, i] = W[o, i] + D[i mod r, o mod m].

    x (..., in), weight (out, in), bone (r, m) where m divides out (m = out is Bone, less is its
    mini form), bias (out,) or None -> (..., out) in x's dtype. in need not be a multiple of r.
    """
    return apply_to_tokens(_Bone, x, base, bone)


class _Bone(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bone: Tensor, product: Product) -> Tensor:
        rank, width = bone.shape
        ctx.product = product
        total = shard_sum(x, rank)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight, bone, total if ctx.needs_input_grad[3] else None
        )
        out_features = product.shape(weight)[0]
        if width < out_features:
            return plus_tiled(
                matmul(total, bone),
                out_features,
                lambda: product.forward(x, weight, bias),
                lambda y: product.add_forward_(y, x, weight, bias),
            )
        y = matmul(total, bone)
        product.add_forward_(y, x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bone, total = ctx.saved_tensors
        need_x, _, _, need_bone, _ = ctx.needs_input_grad
        rank, width = bone.shape
        folded = g if width == g.shape[1] else split_shards(g, width).sum(1)  # (T, m)
        dx = None
        if need_x:
            dx = plus_tiled(
                matmul(folded, bone.t()),
                ctx.product.shape(weight)[1],
                lambda: ctx.product.backward(g, weight),
                lambda dx: ctx.product.add_backward_(dx, g, weight),
            )
        return (dx, *of_weight_and_bias(ctx, g, x, weight), matmul(total.t(), folded) if need_bone else None, None)
