"""Helpers of the mix operations' autograd Functions on any device."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from ..native.operator import Operator
from . import cpu, cuda

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
