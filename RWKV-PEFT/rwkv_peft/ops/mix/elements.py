"""The autograd Functions of operations.py's table over cpu/mix and cuda/mix.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import compute, differentiable_once, rounded, rows_of
from .operations import OPERATIONS, Operation, class_name


def _function(name: str, op: Operation) -> type[Function]:
    """The Function of an operation: eps or None, its inputs and its parameters -> its outputs."""

    def forward(ctx: Any, eps: float | None, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        outs = tuple(torch.empty_like(given[len(op.inputs) - 1]) for _ in op.outputs)
        ctx.save_for_backward(*(outs if op.from_result else given))
        ctx.sizes = _sizes(op, given[0], eps)
        read = dict(zip(op.inputs + op.parameters, given))
        compute(f"{name}_forward", read, dict(zip(op.outputs, outs)), **ctx.sizes)
        return outs if len(outs) > 1 else outs[0]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in saved[: len(op.inputs)]]
        parameters = saved[len(op.inputs) :]
        wanted = any(ctx.needs_input_grad[1 + len(op.inputs) :])
        sums = [torch.empty_like(x, dtype=torch.float32) if wanted else None for x in parameters]
        of_outputs, *names = op.gradients
        read = dict(zip(op.saved + of_outputs, (*saved, *grads)))
        written = dict(zip(names[0] + names[1], (*gradients, *sums)))
        compute(f"{name}_backward", read, written, **ctx.sizes)
        return None, *gradients, *rounded(sums, saved[0].dtype)

    ways = {"forward": staticmethod(forward), "backward": staticmethod(differentiable_once(backward))}
    return type(class_name(name), (Function,), ways)


def _sizes(op: Operation, like: Tensor, eps: float | None) -> dict[str, Any]:
    return (head_sizes(like) if op.by_head else rows_of(like)) | ({} if eps is None else dict(eps=eps))


def head_sizes(like: Tensor) -> dict[str, int]:
    """The sizes of a tensor (B, T, H, N) that a kernel needs."""
    B, T, H, N = like.shape
    return dict(tokens=B * T, channels=H * N, size=N)


KERNELS: Mapping[str, type[Function]] = MappingProxyType({name: _function(name, op) for name, op in OPERATIONS.items()})
