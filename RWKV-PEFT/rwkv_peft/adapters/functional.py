"""Linear layers with an adapter, evaluated without ever forming the merged weight.

Each function computes y = x W'ᵀ + bias for x (..., in) with a hand-derived backward that saves the
least: `bat_in` and `lora` save x, `bone` saves only the sum of x's shards (T, rank). None saves a
tensor of the weight's size besides the weight itself. `bat_out` is in weight_side.py.

The weight may be frozen or trainable, dense or quantized (see product.py); x too may need no
gradient. Under autocast activations and adapter parameters are cast to its dtype; the weight is
cast for the time of one product. Gradients of gradients are not defined.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops import bone as blocks
from .product import DENSE


def bat_in(x, weight, bone, bias=None, *, product=DENSE):
    """Block affine by input block: W'_ab = W_ab + W_ab B_b + B_b.

    x (..., in), weight (out, in), bone (in/r, r, r), bias (out,) or None -> (..., out) in x's dtype.
    r must divide in and out. Costs 4 T in out + 6 T in r FLOPs forward and backward.
    """
    return apply_to_tokens(_BatIn, x, weight, bias, bone, product=product)


def bone(x, weight, bone, bias=None, *, product=DENSE):
    """Dimension sharding: W'[o, i] = W[o, i] + D[i mod r, o mod m].

    x (..., in), weight (out, in), bone (r, m) where m divides out (m = out is Bone, less is its
    mini form), bias (out,) or None -> (..., out) in x's dtype. in need not be a multiple of r.
    """
    return apply_to_tokens(_Bone, x, weight, bias, bone, product=product)


def lora(x, weight, lora_A, lora_B, bias=None, *, scale=1.0, product=DENSE):
    """Low rank: W' = W + scale B A.

    x (..., in), weight (out, in), lora_A (r, in), lora_B (out, r), bias (out,) or None -> (..., out).
    """
    return apply_to_tokens(_Lora, x, weight, bias, lora_A, lora_B, product=product, extra=(scale,))


def linear(x, weight, bias=None, *, product=DENSE):
    """The layer without an adapter. Unlike F.linear it keeps no cast or dequantized weight for backward."""
    return apply_to_tokens(_Linear, x, weight, bias, product=product)


def apply_to_tokens(function, x, weight, bias, *params, product, extra=()):
    """Apply an autograd Function over the flattened tokens of x, in one dtype."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return apply_to_tokens(function, x, weight, bias, *params, product=product, extra=extra)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (T, in)
    y = function.apply(tokens, weight, bias, *(param.to(x.dtype) for param in params), product, *extra)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def weight_gradient(g, x):
    """gᵀ x: g (T, out), x (T, in) -> (out, in)."""
    return blocks.transposed(g) @ x


class _BatIn(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, bone, product):
        ctx.product = product
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None, weight, bone)
        z, shift = _affine_shards(x, bone)
        y = product.forward(z, weight, bias)
        add_tiled_(y, shift)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, bone = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad[:4]
        dx = d_weight = d_bone = None
        if need_weight:
            d_weight = weight_gradient(g, _affine_shards(x, bone)[0]).to(weight.dtype)
        if need_x or need_bone:
            dx = ctx.product.backward(g, weight)  # holds dz, and becomes dx a few tokens at a time
            d_bone = _affine_shards_backward(dx, g, x if need_bone else None, bone)
        return dx if need_x else None, d_weight, g.sum(0) if need_bias else None, d_bone, None


def _affine_shards(x, bone):
    """z = x + u and s = Σ_b u_b where u_b = B_b x_b: x (T, in) -> (T, in), (T, r)."""
    if blocks.takes(x, bone):
        return blocks.affine(x, bone)
    rank = bone.shape[-1]
    z, shift = torch.empty_like(x), x.new_empty(x.shape[0], rank)
    for tokens in _token_chunks(x):
        z[tokens] = x[tokens]  # in memory's order, so that the strided reads below find it in the cache
        shards = split_shards(z[tokens], rank).transpose(0, 1)  # (in/r, t, r)
        u = torch.bmm(shards, bone.transpose(1, 2))
        torch.sum(u, 0, out=shift[tokens])
        shards += u
    return z, shift


def _affine_shards_backward(dz, g, x, bone):
    """Turn dz (T, in) into dx in place; -> the gradient of bone where x (T, in) is given, else None.

    du_b = dz_b + Σ_a g_a, dB_b = du_bᵀ x_b, dx_b = dz_b + B_bᵀ du_b.
    """
    if blocks.takes(dz, g, x, bone) and dz.is_contiguous():
        return blocks.affine_backward_(dz, g, x, bone)
    rank = bone.shape[-1]
    g_shift = split_shards(g, rank).sum(1)  # (T, r)
    d_bone = None if x is None else bone.new_zeros(bone.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for tokens in _token_chunks(dz):
        shards = split_shards(dz[tokens], rank).transpose(0, 1)  # (in/r, t, r)
        du = torch.add(shards, g_shift[tokens], out=shards.new_empty(shards.shape))
        if x is not None:
            _accumulate_bmm(d_bone, du.transpose(1, 2), split_shards(x[tokens], rank).transpose(0, 1))
        shards += torch.bmm(du, bone)
    return None if x is None else d_bone.to(bone.dtype)


def _token_chunks(x):
    """Slices of tokens that hold little enough of x (T, in) to stay in the cache (CPU) or in memory (GPU)."""
    elements = 1 << 18 if x.device.type == "cpu" else 1 << 26
    step = max(64, elements // max(1, x.shape[1]) // 64 * 64)
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def _accumulate_bmm(total, left, right):
    """total += left right, where total may have a wider dtype."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


def split_shards(x, rank):
    """(T, n r) -> (T, n, r)."""
    return x.unflatten(1, (-1, rank))


class _Bone(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, bone, product):
        rank, width = bone.shape
        total = shard_sum(x, rank)
        ctx.product = product
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight, bone, total if ctx.needs_input_grad[3] else None
        )
        y = product.forward(x, weight, bias)
        if width == y.shape[1]:
            y.addmm_(total, bone)
        else:
            split_shards(y, width).add_((total @ bone)[:, None])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, bone, total = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad[:4]
        rank, width = bone.shape
        folded = g if width == g.shape[1] else split_shards(g, width).sum(1)  # (T, m)
        dx = None
        if need_x:
            dx = ctx.product.backward(g, weight)
            add_tiled_(dx, folded @ bone.t())
        return (
            dx,
            weight_gradient(g, x).to(weight.dtype) if need_weight else None,
            g.sum(0) if need_bias else None,
            total.t() @ folded if need_bone else None,
            None,
        )


def shard_sum(x, rank):
    """Σ_b x_b, the last shard padded with zeros: (T, in) -> (T, r)."""
    if blocks.takes(x):
        return blocks.shard_sum(x, rank)
    full = x.shape[1] // rank * rank
    total = split_shards(x[:, :full], rank).sum(1) if full else x.new_zeros(x.shape[0], rank)
    rest = x.shape[1] - full
    if rest:
        total[:, :rest] += x[:, full:]
    return total


def add_tiled_(x, tile):
    """x (T, in) += tile (T, r) repeated along the channels, cut at in."""
    if blocks.takes(x, tile) and x.is_contiguous():
        return blocks.add_tiled_(x, tile)
    rank = tile.shape[1]
    full = x.shape[1] // rank * rank
    if full:
        split_shards(x[:, :full], rank).add_(tile[:, None])
    if full != x.shape[1]:
        x[:, full:] += tile[:, : x.shape[1] - full]


class _Lora(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, product, scale):
        inner = x @ lora_A.t()  # (T, r)
        ctx.product, ctx.scale = product, scale
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None,
            weight,
            lora_A,
            lora_B,
            inner if ctx.needs_input_grad[4] else None,
        )
        return product.forward(x, weight, bias).addmm_(inner, lora_B.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, lora_A, lora_B, inner = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        g_inner = (g @ lora_B).mul_(ctx.scale) if need_x or need_A else None  # (T, r)
        return (
            ctx.product.backward(g, weight).addmm_(g_inner, lora_A) if need_x else None,
            weight_gradient(g, x).to(weight.dtype) if need_weight else None,
            g.sum(0) if need_bias else None,
            g_inner.t() @ x if need_A else None,
            (g.t() @ inner).mul_(ctx.scale) if need_B else None,
            None,
            None,
        )


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.product = product
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        return (
            ctx.product.backward(g, weight) if need_x else None,
            weight_gradient(g, x).to(weight.dtype) if need_weight else None,
            g.sum(0) if need_bias else None,
            None,
        )
