"""A recurrence's backends under autograd, without torch's operators, whose dispatch costs more than a small call.

torch.compile and FakeTensor need the operators (operators.py); nothing else does.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .backends import Backend


class Differentiable(Function):
    """(operation's name, backend, its level, *inputs, state, cu_seqlens) -> y, final state, differentiable once."""

    @staticmethod
    def forward(ctx: Any, op: str, backend: Backend, level: str, *tensors: Tensor | None) -> Any:
        y, final_state, checkpoints = backend.forward(*tensors, save=True, level=level)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, checkpoints)
        ctx.op, ctx.backend, ctx.level = op, backend, level
        return y, final_state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # read once: a second reading is an error if blocks are recomputed
        if all([x is None for x in gradients]):
            return (None,) * (2 + len(saved))
        gy, gfinal = (None if x is None else x.contiguous() for x in gradients)
        *found, gstate = _Gradients.apply(ctx.op, ctx.backend, ctx.level, *saved, gy, gfinal)
        state = saved[-3]
        return None, None, None, *found, None if state is None else gstate, None


class _Gradients(Function):
    """Backward as a Function of its own, so that a second derivative raises a clear error."""

    @staticmethod
    def forward(ctx: Any, op: str, backend: Backend, level: str, *tensors: Tensor | None) -> Any:
        ctx.op = op
        return backend.backward(*tensors, level=level)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise second_derivative(ctx.op)


def second_derivative(op: str) -> RuntimeError:
    """The error for a second derivative through the kernels of `op`."""
    return RuntimeError(
        f"{op}'s kernels have no second derivative; differentiate twice with {op}(..., backend='reference')"
    )
