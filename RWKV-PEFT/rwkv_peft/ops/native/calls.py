"""Calls of kernels: the tensors that they take, the structures that pass them, and their place in graphs of
torch.compile, which is not imported for them.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Structure = TypeVar("Structure", bound=ctypes.Structure)
Given = TypeVar("Given", bound=Tensor | None)
Gradients = TypeVar("Gradients")
Wrapped = TypeVar("Wrapped", bound=Callable[..., Any])


def takes(first: Tensor, *others: Tensor | None) -> bool:
    """True if the kernels take these tensors (None: not given): real ones on the CPU, all float32 or all bfloat16."""
    return (
        first.is_cpu
        and first.dtype in (torch.float32, torch.bfloat16)
        and all([x is None or (x.dtype == first.dtype and x.is_cpu) for x in others])
        and first.numel() > 0
        and type(first) is Tensor  # not a fake one
    )


def fields(
    pointers: str, sizes: str, numbers: str = "", flags: str = "bfloat16 threads"
) -> list[tuple[str, type[ctypes._SimpleCData]]]:
    """The fields of a structure: names of pointers, of 64-bit sizes, of float32 numbers and of ints."""
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (numbers, ctypes.c_float), (flags, ctypes.c_int))
    return [(name, kind) for names, kind in kinds for name in names.split()]


def fill(structure: type[Structure], like: Tensor, tensors: Mapping[str, Tensor | None], **others: float) -> Structure:
    """A structure of `fields` for the dtype of `like`, given tensors by name (None: not given) and the `others`."""
    return structure(
        bfloat16=like.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        **others,
        **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
    )


def aligned(x: Given) -> Given:
    """x if it is aligned for the kernels' copies of 8 and 16 bytes, else a copy of it."""
    return x if x is None or x.data_ptr() % 16 == 0 else cast(Given, x.clone())


def constant_when_compiled(function: Wrapped) -> Wrapped:
    """torch.compiler.assume_constant_result: under torch.compile the function's result is a constant of the graph.

    That decorator imports torch's compiler, which takes as long as the rest of torch, to set the one attribute that is
    set here; tests/ops/test_compiled.py compares the two.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


NAMESPACE = "rwkv_peft"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
SCHEMA = "(str kernel, str[] names, Tensor[] read, Tensor(a!)[] written, SymInt[] sizes, float[] numbers) -> ()"


class Operator:
    """The operator rwkv_peft::NAME, which calls run(kernel, like, tensors by name, **numbers by name); `like` is the
    first tensor. Outside of torch.compile `run` is called at once, because dispatch takes as long as a small kernel."""

    def __init__(self, name: str, run: Callable[..., None]) -> None:
        self.run = run
        _LIBRARY.define(name + SCHEMA)
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None, lib=_LIBRARY)
        self.operator = getattr(torch.ops.rwkv_peft, name).default

    def __call__(
        self, kernel: str, read: Mapping[str, Tensor | None], written: Mapping[str, Tensor | None], **numbers: Any
    ) -> None:
        """Run a kernel, which reads some tensors and writes into others, by their names (None: not given)."""
        reads, writes = ({name: x for name, x in of.items() if x is not None} for of in (read, written))
        if not torch.compiler.is_compiling():
            return self.run(kernel, next(iter((reads or writes).values())), reads | writes, **numbers)
        floats = {name: x for name, x in numbers.items() if isinstance(x, float)}
        sizes = {name: x for name, x in numbers.items() if name not in floats}
        names = [*reads, *writes, *sizes, *floats]
        self.operator(kernel, names, *([*of.values()] for of in (reads, writes, sizes, floats)))

    def _run(self, kernel: str, names: list[str], *given: list[Any]) -> None:
        tensors, values = given[0] + given[1], given[2] + given[3]
        count = len(tensors)
        named = dict(zip(names, tensors))
        self.run(kernel, tensors[0], named, **dict(zip(names[count:], values, strict=True)))


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A Function's backward with contiguous gradients, which refuses create_graph=True: its result would count as a
    constant."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the kernels have no second derivative; differentiate twice in float64, which takes the plain form"
            )
        return backward(ctx, *(None if grad is None else grad.contiguous() for grad in grads))

    return checked
