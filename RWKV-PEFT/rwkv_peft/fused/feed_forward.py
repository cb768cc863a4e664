"""The feed-forward's key, squared relu and value: layer by layer, or as one chain if both layers have a BlockTerm
(bat-in) and frozen weights.

In the chain, key does not add the tile that all blocks of its outputs share, but passes it on; value's kernels add the
tile, square, and make their own term of the square in one pass, forward and backward. The only wide tensor that is kept
is the result W (x + u) of key; neither the square nor its input is ever in memory.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..adapters.functions.bat_in import tiled_product
from ..adapters.functions.tokens import flat
from ..adapters.layer import AdapterLinear
from ..ops.bone import affine, affine_backward_, shard_sum
from ..ops.bone.cuda import PRODUCT_RANKS
from ..ops.mix import relu_square

FeedForward = Callable[[nn.Module, nn.Module, Tensor], Tensor]  # key, value, x (B, T, C) -> (B, T, C)


def layer_by_layer(key: nn.Module, value: nn.Module, x: Tensor) -> Tensor:
    """value(max(key(x), 0)²)."""
    y: Tensor = value(relu_square(key(x)))
    return y


def chains(key: nn.Module, value: nn.Module) -> bool:
    """True if two layers can be computed as a chain."""
    return all([isinstance(layer, AdapterLinear) and _links(layer) for layer in (key, value)])


def _links(layer: AdapterLinear) -> bool:
    return layer.rank in PRODUCT_RANKS and not layer.base.requires_grad and layer.term() is not None


def chained(key: nn.Module, value: nn.Module, x: Tensor) -> Tensor:
    """layer_by_layer's result, for two layers that can be a chain."""
    assert isinstance(key, AdapterLinear) and isinstance(value, AdapterLinear)
    opened, closing = key.term(), value.term()
    assert opened is not None and closing is not None
    k, tile = KeyUpToTile.apply(flat(x), *key.frozen, *opened)
    y: Tensor = ValueOfSquare.apply(k, tile, *value.frozen, *closing)
    return y.view(*x.shape[:-1], y.shape[-1])


class KeyUpToTile(Function):
    """x (T, in), a Frozen layer, a BlockTerm -> W (x + u) + bias (T, out), and the tile factor Σ_b u_b (T, r), not yet
    added to each block of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Any, matrices: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        ctx.product, ctx.factor = product, factor
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, weight, matrices)
        z, tile = affine(x, matrices, factor)
        return product.forward(z, weight, bias), tile.sum(0) if tile.dim() == 3 else tile

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_tile: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, matrices = ctx.saved_tensors
        dx = ctx.product.backward(g, weight)  # dz now, dx after the next line
        d_matrices = affine_backward_(dx, g_tile, x, matrices, ctx.factor)
        return dx if ctx.needs_input_grad[0] else None, None, None, None, d_matrices, None


class ValueOfSquare(Function):
    """k (T, in), tile (T, r), a Frozen layer, a BlockTerm -> the layer with its term, of s = max(k + tile, 0)²:
    W (s + u) + bias + factor Σ_b u_b (T, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        tile: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product: Any,
        matrices: Tensor,
        factor: float,
    ) -> Tensor:
        ctx.product, ctx.factor = product, factor
        ctx.save_for_backward(k, tile, weight, matrices)
        z, shift = affine(k, matrices, factor, tile)
        return tiled_product(z, shift, weight, bias, product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        k, tile, weight, matrices = ctx.saved_tensors
        dk = ctx.product.backward(g, weight)  # dz now, dk after the next line
        d_matrices = affine_backward_(dk, g, k, matrices, ctx.factor, tile)
        return dk, shard_sum(dk, matrices.shape[-1]), None, None, None, d_matrices, None
