"""Adapters before and after a squared relu that leave their parts of low rank to its kernel, on a GPU.

The layer before leaves its own term open: y = W x + b, and left and up, whose product is still to be added. The layer
after has it added and the sum squared, and right made, what its first factor makes of the square. What each does with
its frozen weight is then a plain product, to which nothing is added in memory. ops/mix's low_square does the rest, and
gives the gradients of left and of the factors that it reads. After bat-in, bat-in itself squares what it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops.bone import plus_tiled, shard_sum
from ..ops.mix import low_square
from .method import Opened, Params
from .product import Frozen, Product
from .tokens import apply_to_tokens, flat, of_weight_and_bias


class Factors(NamedTuple):
    """An adapter's term as scale x down up: down (in, r), or None for the sum over shards; up (r, out)."""

    down: torch.Tensor | None
    up: torch.Tensor


@dataclass(frozen=True)
class LowRank:
    """AroundSquare of a method whose term is of low rank: factors gives those of a layer's params."""

    factors: Callable[[Params], Factors]

    def opened(self, x: torch.Tensor, base: Frozen, params: Params, scale: float) -> Opened:
        down, up = self.factors(params)
        y, left = _Before.apply(flat(x), base.weight, base.bias, down, len(up), base.product, scale)
        return Opened(y.view(*x.shape[:-1], y.shape[-1]), left, up)

    def squared(self, before: Opened, params: Params, rank: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """right is the square times down."""
        return low_square(*before, self.factors(params).down, rank)

    def closed(
        self, x: torch.Tensor, right: torch.Tensor | None, base: Frozen, params: Params, scale: float
    ) -> torch.Tensor:
        assert right is not None  # as `squared` has it
        weight, bias, product, residual = base
        inputs = right, self.factors(params).up
        return apply_to_tokens(_After, x, weight, bias, *inputs, product=product, residual=residual, extra=(scale,))


def scaled_product(
    a: torch.Tensor, b: torch.Tensor, scale: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """scale a b, for matrices, added to a residual where there is one, in one operation."""
    if residual is None:
        return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)
    return torch.addmm(residual, a, b, alpha=scale)


class _Before(Function):
    """x (T, in), weight, bias or None, down (in, r) or None -> W x + bias (T, out), left = scale x down (T, r)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor | None,
        rank: int,
        product: Product,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.product, ctx.scale = product, scale
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None, weight, down)
        left = shard_sum(x, rank) if down is None else scaled_product(x, down, scale)
        return product.forward(x, weight, bias), left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor, g_left: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down = ctx.saved_tensors
        need_x, _, _, need_down = ctx.needs_input_grad[:4]
        dx = None
        if need_x and down is None:
            dx = plus_tiled(
                g_left,
                ctx.product.shape(weight)[1],
                lambda: ctx.product.backward(g, weight),
                lambda dx: ctx.product.add_backward_(dx, g, weight),
            )
        elif need_x:
            dx = scaled_product(g_left, down.t(), ctx.scale)
            ctx.product.add_backward_(dx, g, weight)
        return (
            dx,
            *of_weight_and_bias(ctx, g, x, weight),
            scaled_product(g_left.t(), x, ctx.scale).t() if need_down else None,  # as the factor lies in memory
            None,
            None,
            None,
        )


class _After(Function):
    """x (T, in), weight, bias or None, residual (T, out) or None, right (T, r), up (r, out) -> their sum (T, out): W x,
    bias, residual and scale right up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        right: torch.Tensor,
        up: torch.Tensor,
        product: Product,
        scale: float,
    ) -> torch.Tensor:
        ctx.product, ctx.scale = product, scale
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, right if needs[5] else None, weight, up)
        y = scaled_product(right, up, scale, residual)
        product.add_forward_(y, x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, right, weight, up = ctx.saved_tensors
        need_x, _, _, need_residual, need_right, need_up = ctx.needs_input_grad[:6]
        g_up = None
        if need_up:  # as it lies in memory
            rows = up.is_contiguous()
            g_up = scaled_product(right.t(), g, ctx.scale) if rows else scaled_product(g.t(), right, ctx.scale).t()
        return (
            ctx.product.backward(g, weight) if need_x else None,
            *of_weight_and_bias(ctx, g, x, weight),
            g if need_residual else None,
            scaled_product(g, up.t(), ctx.scale) if need_right else None,
            g_up,
            None,
            None,
        )
