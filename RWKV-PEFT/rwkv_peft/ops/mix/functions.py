"""The mix operations' autograd Functions over cpu/mix and cuda/mix: operations.py's table of them, and their helpers.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py ensures that.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from ..native.compiled import Operator
from . import cpu, cuda
from .operations import OPERATIONS, Operation, class_name

Gradients = TypeVar("Gradients")
Item = TypeVar("Item")


def call(name: str, like: Tensor, tensors: Mapping[str, Tensor], **sizes: Any) -> None:
    """Run an operation, such as "relu_square_forward", where `like` is, on tensors by name."""
    (cuda.call if like.is_cuda else cpu.call)(name, like, tensors, **sizes)


compute = Operator("mix", lambda *given, **sizes: call(*given, **sizes))


class _NoGradient:
    """Stands in for an autograd context if nothing will be differentiated."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save nothing."""


def run(function: type[Function], *arguments: Any) -> Any:
    """function.apply(*arguments); without gradients no autograd, which on one token costs several kernels."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoGradient(), *arguments)


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make a backward refuse create_graph=True, which would take its result for a constant."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the mix kernels have no second derivative; differentiate twice in float64, which takes the plain form"
            )
        return backward(ctx, *(None if grad is None else grad.contiguous() for grad in grads))

    return checked


def numbered(kind: str, tensors: Iterable[Item]) -> dict[str, Item]:
    """Name several tensors of a kind as layouts do: out0, out1, …"""
    return {f"{kind}{i}": x for i, x in enumerate(tensors)}


def rows_of(x: Tensor) -> dict[str, int]:
    """The sizes of x (…, C) that a kernel needs."""
    return dict(tokens=x.shape[:-1].numel(), channels=x.shape[-1])


def room_like(x: Tensor | None) -> Tensor | None:
    """An empty tensor like x; None for None."""
    return None if x is None else torch.empty_like(x)


def rounded(sums: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Convert parameters' gradients, which are float32 sums over tokens, to a dtype; None stays."""
    return [None if x is None else x.to(dtype) for x in sums]


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
