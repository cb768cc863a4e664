"""bat-in: Bone in its block affine form by input block, evaluated on the activations.

With u_b = B_b x_b, y = W (x + u) + tile(Σ_b u_b): the merged weight is never formed, x alone is saved for the backward
pass, and a quantized weight serves as it is.
"""

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops import bone as kernels
from .block_affine import BlockAffine
from .method import Params, Shapes
from .product import DENSE, Product
from .tokens import add_tiled_, apply_to_tokens, split_shards, weight_gradient


class BatIn(BlockAffine):
    """One matrix for each block of inputs: `bone` (in/rank, rank, rank). RWKV-PEFT's bat."""

    name, label, index = "bat-in", "Bone bat-in", "b"
    hf_names = ("bat-in",)

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        return {"bone": (in_features // rank, rank, rank)}

    def apply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        params: Params,
        bias: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        product: Product = DENSE,
    ) -> torch.Tensor:
        return bat_in(x, weight, params["bone"], bias, product=product)

    def for_rwkv_peft(self, module: str, params: Params, scale: float, weight: torch.Tensor | None) -> Params:
        return params


def bat_in(
    x: torch.Tensor,
    weight: torch.Tensor,
    bone: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    product: Product = DENSE,
) -> torch.Tensor:
    """Block affine by input block: W'_ab = W_ab + W_ab B_b + B_b.

    x (..., in), weight (out, in), bone (in/r, r, r), bias (out,) or None -> (..., out) in x's dtype.
    r must divide in and out. Costs 4 T in out + 6 T in r FLOPs forward and backward.
    """
    return apply_to_tokens(_BatIn, x, weight, bias, bone, product=product)


class _BatIn(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, bone: torch.Tensor, product: Product
    ) -> torch.Tensor:
        ctx.product = product
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None, weight, bone)
        z, shift = _affine_shards(x, bone)
        y = product.forward(z, weight, bias)
        add_tiled_(y, shift)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bone = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad[:4]
        dx = d_weight = d_bone = None
        if need_weight:
            d_weight = weight_gradient(g, _affine_shards(x, bone)[0]).to(weight.dtype)
        if need_x or need_bone:
            dx = ctx.product.backward(g, weight)  # holds dz, and becomes dx a few tokens at a time
            d_bone = _affine_shards_backward(dx, g, x if need_bone else None, bone)
        return dx if need_x else None, d_weight, g.sum(0) if need_bias else None, d_bone, None


def _affine_shards(x: torch.Tensor, bone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z = x + u and s = Σ_b u_b where u_b = B_b x_b: x (T, in) -> (T, in), (T, r)."""
    if kernels.takes(x, bone):
        return kernels.affine(x, bone)
    rank = bone.shape[-1]
    z, shift = torch.empty_like(x), x.new_empty(x.shape[0], rank)
    for tokens in _token_chunks(x):
        z[tokens] = x[tokens]  # in memory's order, so that the strided reads below find it in the cache
        shards = split_shards(z[tokens], rank).transpose(0, 1)  # (in/r, t, r)
        u = torch.bmm(shards, bone.transpose(1, 2))
        torch.sum(u, 0, out=shift[tokens])
        shards += u
    return z, shift


def _affine_shards_backward(
    dz: torch.Tensor, g: torch.Tensor, x: torch.Tensor | None, bone: torch.Tensor
) -> torch.Tensor | None:
    """Turn dz (T, in) into dx in place; -> the gradient of bone where x (T, in) is given, else None.

    du_b = dz_b + Σ_a g_a, dB_b = du_bᵀ x_b, dx_b = dz_b + B_bᵀ du_b.
    """
    if kernels.takes(dz, g, x, bone) and dz.is_contiguous():
        return kernels.affine_backward_(dz, g, x, bone)
    rank = bone.shape[-1]
    g_shift = split_shards(g, rank).sum(1)  # (T, r)
    d_bone = None if x is None else bone.new_zeros(bone.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for tokens in _token_chunks(dz):
        shards = split_shards(dz[tokens], rank).transpose(0, 1)  # (in/r, t, r)
        du = torch.add(shards, g_shift[tokens], out=shards.new_empty(shards.shape))
        if x is not None and d_bone is not None:
            _accumulate_bmm(d_bone, du.transpose(1, 2), split_shards(x[tokens], rank).transpose(0, 1))
        shards += torch.bmm(du, bone)
    return None if d_bone is None else d_bone.to(bone.dtype)


def _token_chunks(x: torch.Tensor) -> list[slice]:
    """Slices of tokens that hold little enough of x (T, in) to stay in the cache (CPU) or in memory (GPU)."""
    elements = 1 << 18 if x.device.type == "cpu" else 1 << 26
    step = max(64, elements // max(1, x.shape[1]) // 64 * 64)
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def _accumulate_bmm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left right, where total may have a wider dtype."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)
