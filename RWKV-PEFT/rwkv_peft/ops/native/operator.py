"""Kernels in graphs of torch.compile: an operator of torch.library that writes into tensors of the graph."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

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
