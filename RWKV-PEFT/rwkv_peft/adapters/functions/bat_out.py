"""bat-out: block affine by output block, W'_ab = W_ab + W_ab B_a + B_a.

B_a stands to the right of every block of output row a, so its effect on the activations differs for each a: the
activation side costs 4 T in out FLOPs besides the product with W, and the weight side 2 in out r to build W'. Hence the
weight side from T = rank/2 on. Backward is on the weight side always: the gradient of B_a needs the gradient of W',
which makes 6 T in out the floor of a training step. It rebuilds W' a few output blocks at a time and never holds it
whole; between forward and backward only x lives.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...ops.bone import merge, merge_backward_, rows_by_block, shard_sum, split_shards
from ...ops.products import addmm_, einsum, matmul
from ..product import DENSE, Frozen, Product
from .tokens import apply_to_tokens, weight_gradient

CHUNK_ELEMENTS = 1 << 23  # of W' held at a time in backward
GPU_CHUNK_ELEMENTS = 1 << 26  # on a GPU, which few of them leave idle: 128 MiB in bfloat16


def bat_out(x: Tensor, base: Frozen, bone: Tensor, side: str = "auto") -> Tensor:
    """Block affine by output block.

    x (..., in), bone (out/r, r, r) -> (..., out) in x's dtype.
    r must divide in and out. side is "weight", "activation" or "auto" (by the number of tokens).
    """
    if side == "auto":
        side = "weight" if 2 * x.numel() >= x.shape[-1] * bone.shape[-1] else "activation"
    return apply_to_tokens(_BatOut, x, base, bone, extra=(side,))


class _BatOut(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bone: Tensor, product: Product, side: str
    ) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None, weight, bone)
        if side == "weight":
            # Whole, and not by chunks as in backward: one product, the same as without an adapter, keeps a
            # fresh adapter's output bitwise equal.
            merged = merge(product.rows(weight, slice(0, product.shape(weight)[0]), x.dtype), bone)
            return DENSE.forward(x, merged, bias)
        y = product.forward(x, weight, bias)
        total = shard_sum(x, bone.shape[-1])
        for some, rows in _row_chunks(bone, product.shape(weight)[1]):
            y[:, rows] += _activation_rows(x, total, product.rows(weight, rows, x.dtype), bone[some])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bone = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad[:4]
        in_features = ctx.product.shape(weight)[1]
        dx = g.new_empty(g.shape[0], in_features) if need_x else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bone = torch.empty_like(bone) if need_bone else None
        for some, rows in _row_chunks(bone, in_features):
            g_rows, w_rows, b_rows = g[:, rows], ctx.product.rows(weight, rows, g.dtype), bone[some]
            # (a r, in): the gradient of W' so far, if that is needed
            merged = weight_gradient(g_rows, x) if need_weight or need_bone else w_rows
            if d_weight is not None:
                d_merged = rows_by_block(merged, b_rows)
                d_rows = addmm_(d_merged.clone(), d_merged, b_rows.transpose(1, 2))
                d_weight[rows] = d_rows.view(-1, in_features).to(weight.dtype)
            if d_bone is not None:
                merged, d_bone[some] = merge_backward_(merged, w_rows, b_rows)
            elif dx is not None:
                merged = merge(w_rows, b_rows)
            if dx is not None:
                addmm_(dx, g_rows, merged, beta=0 if rows.start == 0 else 1)
            del merged  # before the next one is made
        return dx, d_weight, g.sum(0) if need_bias else None, d_bone, None, None


def _row_chunks(bone: Tensor, in_features: int) -> Iterator[tuple[slice, slice]]:
    """(slice of output blocks, slice of the same blocks' rows), a few blocks at a time."""
    count, rank = bone.shape[:2]
    elements = CHUNK_ELEMENTS if bone.is_cpu else GPU_CHUNK_ELEMENTS  # of W' at a time
    step = max(1, elements // in_features // rank)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), slice(start * rank, stop * rank)


def _activation_rows(x: Tensor, total: Tensor, rows: Tensor, bone: Tensor) -> Tensor:
    """The terms of some output blocks beside x Wᵀ, W_a (B_a x_b)_b + B_a Σ_b x_b: -> (T, a r)."""
    rank = bone.shape[-1]
    u = einsum("tbj,aij->atbi", split_shards(x, rank), bone).flatten(2)  # (a, T, in)
    y = matmul(u, rows.view(-1, rank, rows.shape[1]).transpose(1, 2))  # (a, T, r)
    y += einsum("tj,aij->ati", total, bone)
    return y.transpose(0, 1).flatten(1)
