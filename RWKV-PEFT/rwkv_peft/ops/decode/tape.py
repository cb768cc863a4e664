"""Calls of CPU kernels that are recorded once, over buffers of their own, and made again as one call.

A step of decoding makes some thirty calls a layer, which take Python longer than most of them take the processor.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..mix import cpu as mix
from ..native.calls import fill
from ..recurrence.kernels import CpuRecurrence
from . import CPU, MOST_ROWS, Call, ElementArguments, NormArguments, ProductArguments, given_to_product
from .blocks import Blocks

Structure = TypeVar("Structure", bound=ctypes.Structure)
KINDS = ("", "tanh", "sigmoid")  # as ElementArguments numbers them


class Tape:
    """Calls over `rows` rows in a dtype. Each method adds one, and returns the buffers that it fills; buffers of one
    name and width are the same, so that each is read before it is filled again. Tapes that do not run at once may share
    `memory`, which holds their buffers for MOST_ROWS rows."""

    def __init__(self, rows: int, dtype: torch.dtype, memory: dict[tuple[str, int], Tensor]) -> None:
        self.rows, self.like, self._memory = rows, torch.empty(0, dtype=dtype), memory
        self._calls: list[Call] = []
        self._kept: list[Any] = []  # all that the calls point to
        self._array: Any = None

    def run(self) -> None:
        """Make all calls. Raises MemoryError if a kernel finds none for its work."""
        if self._array is None:
            self._array = (Call * len(self._calls))(*self._calls)
        if CPU.library().decode_run(self._array, len(self._calls)):
            raise MemoryError("decoding: a CPU kernel found no memory for its work buffers; lower the batch")

    def buffer(self, name: str, width: int) -> Tensor:
        """The buffer (rows, width) of a name."""
        if (name, width) not in self._memory:
            self._memory[name, width] = self.like.new_empty(MOST_ROWS, width)
        return self._memory[name, width][: self.rows]

    def product(self, x: Tensor, weight: Tensor | Blocks, name: str) -> Tensor:
        """x (rows, in) times the transpose of weight (out, in)."""
        y = self.buffer(name, weight.out_features if isinstance(weight, Blocks) else len(weight))
        self.product_into(x, weight, y)
        return y

    def product_into(self, x: Tensor, weight: Tensor | Blocks, y: Tensor) -> ProductArguments:
        """product, into y (rows, out)."""
        tensors, sizes = given_to_product(x, weight, y)
        return self._add(CPU.library().decode_product, ProductArguments, tensors, sizes)

    def norm(self, x: Tensor, norm: torch.nn.LayerNorm, y: Tensor, add: Tensor | None = None) -> None:
        """x += add, then y = norm(x)."""
        tensors = dict(x=x, add=add, weight=norm.weight, bias=norm.bias, y=y)
        sizes = dict(rows=self.rows, channels=x.shape[1], eps=norm.eps)
        self._add(CPU.library().decode_norm, NormArguments, tensors, sizes)

    def element(self, kind: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x = f(x + bias), f being one of KINDS."""
        sizes = dict(rows=self.rows, channels=x.shape[1], kind=KINDS.index(kind))
        self._add(CPU.library().decode_elements, ElementArguments, dict(x=x, bias=bias), sizes)
        return x

    def mix(self, op: str, tensors: Mapping[str, Tensor], **sizes: float) -> ctypes.Structure:
        """An operation of cpu/mix, such as "relu_square", on the tensors of its structure."""
        sizes["tokens"] = self.rows
        return self._add(getattr(mix.FAMILY.library(), f"mix_{op}_forward"), mix.STRUCTURES[op], tensors, sizes)

    def lerp(
        self, x: Tensor, maa: Tensor, names: Sequence[str], low: Tensor | None = None, up: Tensor | None = None
    ) -> tuple[list[Tensor], ctypes.Structure]:
        """ops.mix.lerp -> a buffer for each of maa's rows, and the arguments, with `last` still to be filled."""
        outs = [self.buffer(name, x.shape[1]) for name in names]
        table = (ctypes.c_void_p * len(outs))(*(out.data_ptr() for out in outs))
        self._kept.append(table)
        tensors = {name: tensor for name, tensor in dict(x=x, maa=maa, low=low, up=up).items() if tensor is not None}
        sizes = dict(n=len(outs), channels=x.shape[1], rank=0 if up is None else up.shape[1], sequences=self.rows)
        return outs, self.mix("lerp", tensors, outs=ctypes.addressof(table), **sizes)

    def recur(self, recurrence: CpuRecurrence, inputs: Sequence[Tensor], size: int) -> tuple[Tensor, ctypes.Structure]:
        """A step of a recurrence over heads of a size -> y, and the arguments, with `state` and `final_state` still to
        be filled."""
        y = self.buffer("y", inputs[0].shape[1])
        sizes = dict(sequences=self.rows, tokens=self.rows, heads=y.shape[1] // size, head_size=size)
        function = getattr(recurrence.family.library(), f"{recurrence.op}_cpu_forward")
        tensors = dict(zip(recurrence.inputs, inputs), y=y)
        return y, self._add(function, recurrence.Arguments, tensors, sizes, checked=True)

    def _add(
        self,
        function: Any,
        structure: type[Structure],
        tensors: Mapping[str, Tensor | None],
        sizes: Mapping[str, float],
        checked: bool = False,
    ) -> Structure:
        arguments = fill(structure, self.like, tensors, **sizes)
        self._kept += [arguments, tensors]
        self._calls.append(Call(ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(arguments), checked))
        return arguments
