"""A recurrence's kernels as its backends: cpu/OP and cuda/OP.

The CUDA kernels split time into groups if there are few heads: with one block each, most of a GPU would idle
(cuda/wkv6/groups.cuh, cuda/wkv7/groups.cuh).
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..native.calls import aligned, fields, fill
from ..native.cpu import CpuFamily
from ..native.cuda import CudaFamily
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


GRAIN = 64  # a group is a multiple of so many tokens, and so of the chunks and of the distance between saved states
LEAST_TOKENS = 128  # the fewest tokens of a group; with fewer, three launches instead of one do not pay
# The fewest groups of a sequence that pay: by count (docs/benchmarks/gpus.md), finding the states takes half as long as
# the kernels themselves, and a block that shares its multiprocessor takes 1.4 times as long.
LEAST_GROUPS = 3
RESIDENT = 2  # blocks of a multiprocessor: while one waits, the other computes
# capabilities with 100 KB of shared memory; others have 164 KB or more
SMALL = frozenset({(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)})


@dataclass(frozen=True)
class Split:
    """The kernels that run before a recurrence's own, for one head size, if time is split: a pass over all groups that
    computes only their states, one block each, and a scan over each sequence's groups. Both take bfloat16."""

    groups: str  # the pass's name, with {} for "forward" or "backward"
    scan: str  # the scan's name, likewise
    scan_blocks: int  # blocks of the scan for each head of a sequence
    on_small: int = 1  # blocks of the recurrence's own kernels that a multiprocessor with 100 KB of shared memory holds

    def names(self) -> list[str]:
        """The names of all kernels."""
        return [name.format(way) for way in ("forward", "backward") for name in (self.groups, self.scan)]

    def launches(self, direction: str, heads: int, sequences: int, groups: int) -> list[tuple[str, int]]:
        """(kernel, number of blocks) of both."""
        return [
            (self.groups.format(direction), heads * groups),
            (self.scan.format(direction), heads * sequences * self.scan_blocks),
        ]


def group_of(r: Tensor, sequences: int, split: Split) -> int:
    """The tokens of a group if splitting r (B, T, H, N), B rows or one row of packed sequences, pays, else 0."""
    if not r.is_cuda:
        return 0
    B, T, H, _ = r.shape
    return choose_group(B, T, H, sequences, resident_blocks(r.device.index or 0, split.on_small))


def choose_group(B: int, T: int, H: int, sequences: int, resident: int) -> int:
    """group_of for a GPU that holds `resident` blocks at once. Assumes that packed sequences are of one length."""
    groups = resident // (H * sequences)  # of each sequence
    if groups < LEAST_GROUPS:
        return 0
    # Each packed sequence may leave a place unused.
    tokens = -(-T // groups) if sequences == B else -(-T // ((groups - 1) * sequences))
    group = max(LEAST_TOKENS, -(-tokens // GRAIN) * GRAIN)
    return 0 if (LEAST_GROUPS - 1) * group * sequences >= B * T else group


def places(B: int, T: int, sequences: int, group: int) -> int:
    """The most groups in B rows of T tokens, or in one row of packed `sequences`, which may each leave a place unused;
    0 if `group` is 0."""
    if not group:
        return 0
    return B * -(-T // group) if sequences == B else T // group + sequences


@functools.cache
def resident_blocks(device: int, on_small: int) -> int:
    """The number of blocks to keep on GPU number `device` at once, given Split's on_small."""
    properties = torch.cuda.get_device_properties(device)
    small = (properties.major, properties.minor) in SMALL
    return properties.multi_processor_count * (on_small if small else RESIDENT)


INTEGERS = "sequences length heads head_size group groups"
HEAD_SIZE = 64  # of all released models, and the only one that the CUDA kernels take
WAYS = ("forward", "backward")


class CudaRecurrence:
    """The kernels of cuda/OP, launched on torch's stream: for bfloat16 and heads of HEAD_SIZE."""

    def __init__(self, signature: Signature, segment: int, split: Split, halved: bool = False) -> None:
        """segment: steps that share a slot among the checkpoints, arguments.cuh's SEGMENT. split: the kernels that
        split time. halved: True if the kernels store two slots in the room of one."""
        self.segment, self.split, self.halved = segment, split, halved
        op, self.signature = signature.op, signature
        given = (*signature.inputs, "state bounds y final_state checkpoints gy gfinal", *signature.gradients)
        members = fields(" ".join((*given, "gstate parts transitions")), "", "", INTEGERS)
        # the structure of the same name in cuda/OP/arguments.cuh
        self.Arguments: type[ctypes.Structure] = type("Arguments", (ctypes.Structure,), {"_fields_": members})
        self.names = (*(f"{op}_{way}_{HEAD_SIZE}" for way in WAYS), *split.names())
        self.family = CudaFamily(op, self.names, self.Arguments)

    def refusal(self, dtype: torch.dtype, head_size: int) -> str | None:
        """None if the kernels take heads of this size and dtype, else the reason and the remedy."""
        if dtype == torch.bfloat16 and head_size == HEAD_SIZE:
            return None
        return (
            f"its kernels take bfloat16 and heads of {HEAD_SIZE}, and these are {str(dtype).removeprefix('torch.')} "
            f"and {head_size}; --precision bf16 and a released model's shape are fast"
        )

    def unavailable(self, level: str = "") -> str | None:
        """None if the kernels work on the current GPU, else the reason and the remedy."""
        del level  # the CPU kernel's instruction set
        return self.family.unavailable()

    def checkpoint_count(self, r: Tensor, sequences: int) -> int:
        """The number of float32 states (H, N, N) in the checkpoints: a slot for each segment of a sequence, and at most
        one unused; and the groups' transitions if time is split."""
        B, T = r.shape[:2]
        return self._slots(r, sequences) + places(B, T, sequences, self.group_of(r, sequences))

    def group_of(self, r: Tensor, sequences: int) -> int:
        """The tokens of a group if time is split, else 0."""
        return group_of(r, sequences, self.split)

    def _slots(self, r: Tensor, sequences: int) -> int:
        slots = r.shape[0] * r.shape[1] // self.segment + sequences
        return -(-slots // 2) if self.halved else slots

    def forward(
        self, *tensors: Any, save: bool, level: str = "", group: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tensors: the inputs, contiguous, (B, T, H, HEAD_SIZE) in bfloat16, the shared ones in float32; state
        (n, H, N, N) float32 or None; cu_seqlens (n + 1,) int64 or None -> y, final state, checkpoints (empty unless
        `save`). group: the tokens of a group, a multiple of 64, 0 if time is not split, None if that is chosen.
        Raises ValueError for a group that the kernels do not take."""
        *inputs, state, bounds = tensors
        r = inputs[0]
        B, T, H, N = r.shape
        sequences = sequences_of(r, bounds)
        group = self._checked(group, r, sequences)
        groups, slots = places(B, T, sequences, group), self._slots(r, sequences) if save else 0
        counts = (sequences, slots + groups, groups)
        final_state, checkpoints, parts = (r.new_empty(n, H, N, N, dtype=torch.float32) for n in counts)
        y = torch.empty_like(r)
        arguments = self._given(inputs) | dict(state=aligned(state), bounds=bounds, y=y, final_state=final_state)
        arguments |= dict(checkpoints=checkpoints if save else None, parts=parts, transitions=checkpoints[slots:])
        self._launch("forward", r, sequences, group, arguments)
        return y, final_state, checkpoints if save else checkpoints[:0]

    def backward(self, *tensors: Any, level: str = "", group: int | None = None) -> tuple[Tensor, ...]:
        """tensors: forward's, checkpoints, and the gradients of y and of the final state (either None for zeros) -> the
        gradients of the inputs and of the state. group: as in forward."""
        *inputs, _, bounds, checkpoints, gy, gfinal = tensors  # the first checkpoint is the state
        r = inputs[0]
        B, T, H, N = r.shape
        sequences = sequences_of(r, bounds)
        group = self._checked(group, r, sequences)
        gy = torch.zeros_like(r) if gy is None else gy
        arguments = self._given(inputs) | dict(bounds=bounds, checkpoints=checkpoints)
        arguments |= dict(gy=aligned(gy), gfinal=aligned(gfinal), transitions=checkpoints[self._slots(r, sequences) :])
        of_rows = {f"g{name}": torch.empty_like(r) for name in self.signature.rows}
        groups = places(B, T, sequences, group)
        shape = (groups or sequences, H, N)  # each block's own sum
        of_shared = {f"g{name}": r.new_empty(shape, dtype=torch.float32) for name in self.signature.shared}
        counts = (sequences, groups)
        gstate, parts = (r.new_empty(n, H, N, N, dtype=torch.float32) for n in counts)
        arguments |= of_rows | of_shared | dict(gstate=gstate, parts=parts)
        self._launch("backward", r, sequences, group, arguments)
        return *of_rows.values(), *(x.sum(0) for x in of_shared.values()), gstate

    def _checked(self, group: int | None, r: Tensor, sequences: int) -> int:
        """The group, or the chosen one. Raises ValueError for one with which the kernels would read past their
        tensors."""
        group = self.group_of(r, sequences) if group is None else group
        if group % GRAIN or group < 0:
            raise ValueError(
                f"{self.signature.op}: group {group}; time is split in groups of a multiple of {GRAIN} tokens: give "
                "such, or 0"
            )
        return group

    def _given(self, inputs: Sequence[Tensor]) -> dict[str, Tensor | None]:
        return {name: aligned(x) for name, x in zip(self.signature.inputs, inputs)}

    def _launch(
        self, direction: str, r: Tensor, sequences: int, group: int, given: Mapping[str, Tensor | float | None]
    ) -> None:
        """Enqueue a direction's kernels, given their arguments by name. Raises RuntimeError if that fails."""
        B, T, H, N = r.shape
        groups = places(B, T, sequences, group) or sequences
        sizes = dict(sequences=sequences, length=T, heads=H, head_size=N, group=group, groups=groups)
        if group:
            for name, blocks in self.split.launches(direction, H, sequences, groups):
                self.family.run(name, r, {**given, **sizes}, blocks)
        self.family.run(f"{self.signature.op}_{direction}_{HEAD_SIZE}", r, {**given, **sizes}, H * groups)
