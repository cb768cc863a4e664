"""Kernels and choices in graphs of torch.compile, which is not imported for them."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Wrapped = TypeVar("Wrapped", bound=Callable[..., Any])


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
