"""bat-in: Bone in its block affine form by input block, evaluated on the activations.

With u_b = B_b x_b, y = W (x + u) + tile(Σ_b u_b): the merged weight is never formed, x alone is saved for the backward
pass, and a quantized weight serves as it is.
"""

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops import adding
from ..ops.bone import affine, affine_backward_, shard_sum
from ..ops.mix import low_square
from .bent import of_bent, open_of_bent, tiled_product
from .block_affine import BlockAffine
from .method import Opened, Params, Shapes
from .product import DENSE, Frozen, Product
from .tokens import apply_to_tokens, flat, weight_gradient


class OpenBatIn:
    """AfterNorm, AroundSquare and BeforeNorm of bat-in: what is left open is the shift."""

    sums = False

    def bones(self, params: Params, scale: float) -> torch.Tensor:
        return _scaled(params["bone"], scale)

    def given(self, x: torch.Tensor, shift: torch.Tensor, base: Frozen, params: Params, scale: float) -> torch.Tensor:
        return of_bent(x, _divided(shift, scale), base)

    def open_given(self, x: torch.Tensor, shift: torch.Tensor, base: Frozen, params: Params, scale: float) -> Opened:
        return Opened(*open_of_bent(x, _divided(shift, scale), base), None)

    def opened(self, x: torch.Tensor, base: Frozen, params: Params, scale: float) -> Opened:
        return Opened(*open_bat_in(x, base, params["bone"], scale, summed=True), None)

    def squared(self, before: Opened, params: Params, rank: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """After a shift nothing is done yet: right is the shift."""
        if before.up is None:
            return before.y, before.left
        return low_square(*before, None, rank, sums=False)

    def closed(
        self, x: torch.Tensor, right: torch.Tensor | None, base: Frozen, params: Params, scale: float
    ) -> torch.Tensor:
        weight, bias, product, residual = base
        return bat_in(x, weight, params["bone"], bias, scale=scale, product=product, residual=residual, left=right)

    def unshifted(
        self, x: torch.Tensor, right: torch.Tensor | None, base: Frozen, params: Params, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return open_bat_in(x, base, params["bone"], scale, right)


class BatIn(BlockAffine):
    """One matrix for each block of inputs: `bone` (in/rank, rank, rank). RWKV-PEFT's bat."""

    name, label, index = "bat-in", "Bone bat-in", "b"
    hf_names: tuple[bool | str, ...] = ("bat-in",)
    in_rwkv_peft = True
    after_norm = around_square = before_norm = OpenBatIn()

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        return {"bone": (in_features // rank, rank, rank)}

    def apply(self, x: torch.Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> torch.Tensor:
        return bat_in(x, base.weight, params["bone"], base.bias, product=base.product, residual=base.residual)


def bat_in(
    x: torch.Tensor,
    weight: torch.Tensor,
    bone: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    product: Product = DENSE,
    residual: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
) -> torch.Tensor:
    """Block affine by input block: W'_ab = W_ab + scale W_ab B_b + B_b.

    x (..., in), weight (out, in), bone (in/r, r, r), bias (out,) or None, residual (..., out) or None, which is added;
    left (T, r) or None: with it the input is max(x + tile(left), 0)² -> (..., out) in x's dtype.
    r must divide in and out; scale, which is not 0, is a number or, under torch.compile, a tensor (). Costs
    4 T in out + 6 T in r FLOPs forward and backward.
    """
    return apply_to_tokens(_BatIn, x, weight, bias, bone, product=product, residual=residual, extra=(left, scale))


def open_bat_in(
    x: torch.Tensor,
    base: Frozen,
    bone: torch.Tensor,
    scale: float,
    left: torch.Tensor | None = None,
    summed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """bat_in of x (..., in), outside autocast, without what is added to each shard of the outputs: y (..., out), and
    that in parts (n, T, r), of which the sum counts, or summed (T, r)."""
    weight, bias, product, residual = base
    inside = residual if residual is not None and adding.inside_product(x, residual) else None
    inputs = weight, bias, None if inside is None else flat(inside), bone, product, left, scale, summed
    y, shift = _OpenBatIn.apply(flat(x), *inputs)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if inside is not None else adding.added(y, residual), shift


class _BatIn(Function):
    """With the scale a: u_b = a B_b x_b and y = W (x + u) + tile(Σ_b u_b) / a; with left (T, r) of max(x + tile(left),
    0)² in x's place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        bone: torch.Tensor,
        product: Product,
        left: torch.Tensor | None,
        scale: float | torch.Tensor,
    ) -> torch.Tensor:
        z, shift = _begin(ctx, x, weight, bone, product, left, scale)
        return tiled_product(z, shift, Frozen(weight, bias, product, residual))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_residual, need_bone, _, need_left = ctx.needs_input_grad[3:7]
        dx, d_weight, d_bias, d_bone, d_left = _gradients(ctx, g, g, need_bone, need_left)
        return dx, d_weight, d_bias, g if need_residual else None, d_bone, None, d_left, None


class _OpenBatIn(Function):
    """The same without the tiles: -> W (x + u) and Σ_b u_b / a, in parts or `summed`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        bone: torch.Tensor,
        product: Product,
        left: torch.Tensor | None,
        scale: float,
        summed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z, shift = _begin(ctx, x, weight, bone, product, left, scale)
        if summed and shift.dim() == 3:
            shift = shift.sum(0)
        elif not summed and shift.dim() == 2:
            shift = shift[None]
        return product.forward(z, weight, bias, residual), shift

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor, g_shift: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_residual, need_bone, _, need_left = ctx.needs_input_grad[3:7]
        g_shift = g_shift[0] if g_shift.dim() == 3 else g_shift  # all parts', as their sum is what counts
        dx, d_weight, d_bias, d_bone, d_left = _gradients(ctx, g, g_shift, need_bone, need_left)
        return dx, d_weight, d_bias, g if need_residual else None, d_bone, None, d_left, None, None


def _begin(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bone: torch.Tensor,
    product: Product,
    left: torch.Tensor | None,
    scale: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both multiply, x + u (T, in), and the shift as `affine` gives it; keeps what _gradients reads."""
    ctx.product, ctx.scale = product, scale
    needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[4] or left is not None
    ctx.save_for_backward(x if needs_x else None, weight, bone, left)
    return affine(x, _scaled(bone, scale), 1 / scale, left)


def _gradients(
    ctx: Any, g: torch.Tensor, g_tiles: torch.Tensor, need_bone: bool, need_left: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, weight, bias, bone and left, of both: g (T, out), and g_tiles, of which the shift's gradient
    is the sum over shards."""
    x, weight, bone, left = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx = d_weight = d_bone = d_left = None
    scaled = _scaled(bone, ctx.scale)  # made again, and not kept
    if need_weight:
        d_weight = weight_gradient(g, affine(x, scaled, left=left)[0]).to(weight.dtype)
    if need_x or need_bone or need_left:
        dx = ctx.product.backward(g, weight)  # holds dz, and becomes dx a few tokens at a time
        read = x if need_bone or left is not None else None
        d_scaled = affine_backward_(dx, g_tiles, read, scaled, 1 / ctx.scale, left)
        d_bone = _scaled(d_scaled, ctx.scale) if need_bone and d_scaled is not None else None
        d_left = shard_sum(dx, bone.shape[-1]) if need_left else None
    return dx if need_x else None, d_weight, g.sum(0) if need_bias else None, d_bone, d_left


def _divided(shift: torch.Tensor, scale: float) -> torch.Tensor:
    return shift if scale == 1 else shift / scale


def _scaled(bone: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    return bone if isinstance(scale, float) and scale == 1 else scale * bone
