"""The squared relu with terms of low rank before and after, on a GPU: an autograd Function over cuda/mix/square.cuh."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..native.launch import aligned
from . import cuda
from .functions import call, differentiable_once
from .gpu_lerp import group_size


class LowSquare(Function):
    """op.low_square, of bfloat16 tensors that `takes` accepts: x (…, F) contiguous."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor | None, up: Tensor | None, down: Tensor | None, rank: int, sums: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.rank = rank
        out, right = _pass("square_forward", x, None, left, up, down, rank, sums)
        ctx.has_left = left is not None
        ctx.save_for_backward(out, None if up is None else left, up, down)
        ctx.set_materialize_grads(False)  # `right` may have none
        return out, right

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, gright: Tensor | None) -> tuple[Tensor | None, ...]:
        out, left, up, down = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        turned = None if up is None else up.t(), None if down is None else down.t()
        gx, gleft = _pass("square_backward", grad, out, gright, turned[1], turned[0], ctx.rank, ctx.has_left)
        gup = gdown = None
        if left is not None and ctx.needs_input_grad[2]:
            gup = _product_like(up, left.t(), gx.flatten(0, -2))
        if ctx.needs_input_grad[3] and gright is not None:
            gdown = _product_like(down, out.flatten(0, -2).t(), gright)
        return gx, gleft, gup, gdown, None, None


def takes(dtype: torch.dtype, channels: int, rank: int) -> bool:
    """Whether kernels are for terms of a rank around so many channels: their tiles are whole."""
    return dtype == torch.bfloat16 and rank in cuda.SQUARE_RANKS and channels % cuda.SQUARE_CHANNELS == 0


def _pass(
    name: str,
    x: Tensor,
    squares: Tensor | None,
    left: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    rank: int,
    sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """A direction's kernel: y like x, and right (T, r) where `sums`. left (T, r), up (r, F), down (F, r),
    None each as low_square has them; squares: what the forward pass gave."""
    tokens, channels = x[..., 0].numel(), x.shape[-1]
    size, y = group_size(x, cuda.SQUARE_CHANNELS), torch.empty_like(x)
    parts = x.new_empty(-(-channels // size), tokens, rank, dtype=torch.float32) if sums else None
    tensors = dict(x=aligned(x), squares=squares, y=y, parts=parts)
    if left is not None:
        tensors |= dict(left=aligned(left.contiguous())) | _lying("up", up)
    if sums:
        tensors |= _lying("down", None if down is None else down.t())
    call(name, x, tensors, tokens=tokens, channels=channels, rank=rank, size=size)
    if parts is None:
        return y, None
    right = x.new_empty(tokens, rank)
    call("sum_parts", right, dict(parts=parts, total=right), tokens=tokens, channels=rank, n=len(parts))
    return y, right


def _lying(kind: str, matrix: Tensor | None) -> dict[str, Tensor]:
    """A matrix (r, F) under the name that a kernel has for it, as it lies in memory: by rows, or by columns."""
    if matrix is None:  # the identity
        return {}
    if not matrix.is_contiguous() and matrix.t().is_contiguous():
        return {f"{kind}_columns": aligned(matrix)}
    return {f"{kind}_rows": aligned(matrix.contiguous())}


def _product_like(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a b, which lies in memory as `matrix` does."""
    return a @ b if matrix.is_contiguous() else (b.t() @ a.t()).t()
