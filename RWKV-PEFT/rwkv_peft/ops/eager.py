"""A recurrence's kernels under autograd, past torch's operators, whose dispatch costs more than a small call does.

torch.compile and FakeTensor need the operators (wkv6/operators.py, wkv7/operators.py); nothing else does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function


class Recurrence(Function):
    """(op, forward, backward, tensors …, state, cu_seqlens) -> y, final state.

    op: the recurrence's name; forward(tensors …, state, cu_seqlens) -> y, final state, checkpoints;
    backward(tensors …, state, cu_seqlens, checkpoints, gy, gfinal) -> the gradients of the tensors and of the state.
    Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, op: str, forward: Callable, backward: Callable, *inputs: torch.Tensor | None) -> Any:
        y, final_state, checkpoints = forward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, checkpoints)
        ctx.op, ctx.gradients_of = op, backward
        return y, final_state

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        saved = ctx.saved_tensors  # read once: where blocks are recomputed, a second reading is an error
        if all([x is None for x in gradients]):
            return (None,) * (2 + len(saved))
        gy, gfinal = (None if x is None else x.contiguous() for x in gradients)
        *found, gstate = _Gradients.apply(ctx.op, ctx.gradients_of, *saved, gy, gfinal)
        state = saved[-3]
        return None, None, None, *found, None if state is None else gstate, None


class _Gradients(Function):
    """The gradients as a Function of their own, so that a second derivative is refused in words."""

    @staticmethod
    def forward(ctx: Any, op: str, backward: Callable, *inputs: torch.Tensor | None) -> Any:
        ctx.op = op
        return backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        raise second_derivative(ctx.op)


def second_derivative(op: str) -> RuntimeError:
    """The error of a second derivative through the kernels of `op`."""
    return RuntimeError(
        f"{op}'s kernels have no second derivative; differentiate twice with {op}(..., backend='reference')"
    )
