"""A recurrence's CPU kernel as its backend."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..native.arguments import fields, fill
from ..native.cpu import CpuFamily
from .signature import Signature, sequences_of


class CpuRecurrence:
    """The kernel of cpu/OP."""

    def __init__(self, signature: Signature, tile: int) -> None:
        """tile: steps between two saved states, the kernel's kTile."""
        self.op, self.inputs, self.tile = signature.op, signature.inputs, tile
        self.gradients = (*signature.gradients, "gstate")
        pointers = (*self.inputs, "state checkpoints y final_state gy gfinal", *self.gradients, "cu_seqlens")
        members = {"_fields_": fields(" ".join(pointers), "sequences tokens heads head_size")}
        # the structure of the same name in cpu/OP/arguments.h
        self.Arguments: type[ctypes.Structure] = type("Arguments", (ctypes.Structure,), members)
        functions = [(f"{self.op}_cpu_{way}", ctypes.c_int, self.Arguments) for way in ("forward", "backward")]
        self.family = CpuFamily(self.op, functions)

    def unavailable(self, level: str = "") -> str | None:
        """None if the kernel works here (at `level`, or at any), else the reason and the remedy."""
        return self.family.unavailable(level)

    def checkpoint_count(self, r: Tensor, sequences: int) -> int:
        """The states saved for backward: one at each tile's start, but a sequence's first, where the state is the
        input."""
        return r.shape[0] * r.shape[1] // self.tile

    def forward(self, *tensors: Any, save: bool, level: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """tensors: the inputs, (B, T, H, N) in float32 or bfloat16, the shared ones in float32; state (n, H, N, N)
        float32 or None; cu_seqlens (n + 1,) int64 or None; all contiguous -> y, final state, checkpoints (float32,
        empty unless `save`)."""
        *inputs, state, cu_seqlens = tensors
        r = inputs[0]
        B, T, H, N = r.shape
        sequences = sequences_of(r, cu_seqlens)
        count = self.checkpoint_count(r, sequences) if save else 0
        final_state, checkpoints = (r.new_empty(n, H, N, N, dtype=torch.float32) for n in (sequences, count))
        given: dict[str, Tensor | None] = dict(zip(self.inputs, inputs), state=state, cu_seqlens=cu_seqlens)
        y = given["y"] = torch.empty_like(r)
        given |= dict(final_state=final_state, checkpoints=checkpoints if save else None)
        self._call("forward", level, r, sequences, given)
        return y, final_state, checkpoints

    def backward(self, *tensors: Any, level: str = "") -> tuple[Tensor, ...]:
        """tensors: forward's, checkpoints, and the gradients of y and of the final state (either None for zeros) -> the
        gradients of the inputs and of the state."""
        *inputs, state, cu_seqlens, checkpoints, gy, gfinal = tensors
        r = inputs[0]
        _, _, H, N = r.shape
        sequences = sequences_of(r, cu_seqlens)
        gradients = [torch.empty_like(x) for x in inputs]
        gradients.append(r.new_empty(sequences, H, N, N, dtype=torch.float32))
        given = dict(zip(self.inputs, inputs), state=state, cu_seqlens=cu_seqlens, checkpoints=checkpoints)
        given |= dict(zip(self.gradients, gradients), gy=gy, gfinal=gfinal)
        self._call("backward", level, r, sequences, given)
        return tuple(gradients)

    def _call(self, way: str, level: str, r: Tensor, sequences: int, given: dict[str, Tensor | None]) -> None:
        B, T, H, N = r.shape
        arguments = fill(self.Arguments, r, given, sequences=sequences, tokens=B * T, heads=H, head_size=N)
        function = getattr(self.family.library(level), f"{self.op}_cpu_{way}")
        if function(arguments) != 0:
            raise MemoryError(
                f"{self.op}: the CPU kernel found no memory for its work buffers; lower the batch or the threads"
            )
