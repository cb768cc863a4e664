"""Some entries of each row of the weight change. W' is made for a product, a part of its rows at a time in backward,
and is never kept: between forward and backward only x lives."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...ops.products import addmm_
from ..product import DENSE, Frozen, Product
from .bat_out import row_step
from .tokens import apply_to_tokens, weight_gradient


def sparse(x: Tensor, base: Frozen, values: Tensor, columns: Tensor) -> Tensor:
    """W'[o, columns[o, j]] = W[o, columns[o, j]] + values[o, j].

    x (..., in), weight (out, in), values (out, n), columns (out, n) of integers that differ within a row, bias (out,)
    or None -> (..., out) in x's dtype.
    """
    return apply_to_tokens(_Sparse, x, base, values, extra=(columns,))


def added(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Rows (m, in) of the weight with values (m, n) added at their columns (m, n)."""
    return rows.scatter_add(1, columns.long(), values)


class _Sparse(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, product: Product, columns: Tensor
    ) -> Tensor:
        ctx.product = product
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_x else None, weight, values, columns)
        # whole, so that a fresh adapter's output is bitwise the base's: one product, as without an adapter
        rows = product.rows(weight, slice(0, product.shape(weight)[0]), x.dtype)
        return DENSE.forward(x, added(rows, columns, values), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, columns = ctx.saved_tensors
        need_x, need_weight, need_bias, need_values = ctx.needs_input_grad[:4]
        out_features, in_features = ctx.product.shape(weight)
        dx = g.new_zeros(g.shape[0], in_features) if need_x else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_values = torch.empty_like(values) if need_values else None
        step = row_step(values, in_features)
        for rows in (slice(start, min(start + step, out_features)) for start in range(0, out_features, step)):
            if need_weight or need_values:
                gradient = weight_gradient(g[:, rows], x)  # of W'
                if d_weight is not None:
                    d_weight[rows] = gradient.to(weight.dtype)
                if d_values is not None:
                    d_values[rows] = gradient.gather(1, columns[rows].long())
            if dx is not None:
                addmm_(dx, g[:, rows], added(ctx.product.rows(weight, rows, g.dtype), columns[rows], values[rows]))
        return dx, d_weight, g.sum(0) if need_bias else None, d_values, None, None
