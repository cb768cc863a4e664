"""What the autograd Functions of the mix operations share, whatever the device."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.autograd import Function

from . import cpu, cuda

Gradients = TypeVar("Gradients")
Item = TypeVar("Item")


def call(name: str, like: torch.Tensor, tensors: Mapping[str, torch.Tensor | None], **sizes: Any) -> None:
    """Run an operation, "relu_square_forward" or the like, where the tensor `like` is: tensors by name, or None, and
    sizes."""
    (cuda.call if like.is_cuda else cpu.call)(name, like, tensors, **sizes)


class _NoGradient:
    """Stands for an autograd context where nothing will be differentiated."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Nothing is saved."""

    def set_materialize_grads(self, value: bool) -> None:
        """Nor is anything told of gradients."""

    def mark_non_differentiable(self, *outs: torch.Tensor) -> None:
        """Nothing is differentiable."""


def run(function: type[Function], *arguments: Any) -> Any:
    """function.apply(*arguments), past autograd where gradients are off: on one token its bookkeeping costs several
    times the kernel."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoGradient(), *arguments)


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward that refuses create_graph=True, which would take its result for a constant."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: torch.Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the mix kernels have no second derivative; differentiate twice in float64, which takes the plain form"
            )
        return backward(ctx, *(None if grad is None else grad.contiguous() for grad in grads))

    return checked


def with_zeros(grads: Iterable[torch.Tensor | None], like: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of tensors like `like`, zeros for those that nobody gives."""
    return [torch.zeros_like(like) if grad is None else grad for grad in grads]


def numbered(kind: str, tensors: Iterable[Item], first: int = 0) -> dict[str, Item]:
    """Tensors by the names that layouts give several of a kind: out0, out1, … from `first` on."""
    return {f"{kind}{i}": x for i, x in enumerate(tensors, first)}


def room_like(x: torch.Tensor | None) -> torch.Tensor | None:
    """Room for another such tensor; None for None."""
    return None if x is None else torch.empty_like(x)


def sums_like(parameters: Sequence[torch.Tensor], wanted: bool) -> list[torch.Tensor | None]:
    """Room for the gradients of parameters, sums over tokens: float32; None each where not wanted."""
    return [torch.empty_like(parameter, dtype=torch.float32) if wanted else None for parameter in parameters]


def rounded(sums: Sequence[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Those gradients in the parameters' dtype."""
    return [None if x is None else x.to(dtype) for x in sums]
