"""bat-in's layers whose input comes bent: z = x + u, and shift, the sum over shards of u (bat_in.py), which a GPU's
kernels make where they make x (ops/mix/affine.py). The weight is frozen."""

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops.bone import plus_tiled, shard_sum
from .product import Frozen, Product
from .tokens import apply_to_tokens, linear


def of_bent(z: torch.Tensor, shift: torch.Tensor, base: Frozen) -> torch.Tensor:
    """W z + bias + tile(shift) and the residual: z (..., in), shift (T, r) -> (..., out)."""
    return apply_to_tokens(_OfBent, z, base.weight, base.bias, shift, product=base.product, residual=base.residual)


def open_of_bent(z: torch.Tensor, shift: torch.Tensor, base: Frozen) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without the shift, which whoever reads the result adds, and the shift."""
    return linear(z, base.weight, base.bias, product=base.product, residual=base.residual), shift


def tiled_product(z: torch.Tensor, shift: torch.Tensor, base: Frozen) -> torch.Tensor:
    """`of_bent` of tokens, without gradients: z (T, in), shift (T, r), or parts of it (n, T, r) -> (T, out)."""
    weight, bias, product, residual = base
    return plus_tiled(
        shift,
        product.shape(weight)[0],
        lambda: product.forward(z, weight, bias, residual),
        lambda y: product.add_forward_(y, z, weight, bias),
        residual,
    )


class _OfBent(Function):
    """z (T, in), weight (out, in), bias or None, residual (T, out) or None, shift (T, r) -> (T, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        shift: torch.Tensor,
        product: Product,
    ) -> torch.Tensor:
        ctx.product, ctx.rank = product, shift.shape[1]
        ctx.save_for_backward(weight)
        return tiled_product(z, shift, Frozen(weight, bias, product, residual))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        need_z, _, need_bias, need_residual, need_shift = ctx.needs_input_grad[:5]
        return (
            ctx.product.backward(g, weight) if need_z else None,
            None,
            g.sum(0) if need_bias else None,
            g if need_residual else None,
            shard_sum(g, ctx.rank) if need_shift else None,
            None,
        )
