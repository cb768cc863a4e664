"""A recurrence's chunked form in plain torch as its backend, for any device: products of matrices instead of single
steps, a segment of chunks at a time. Sequences are padded to whole chunks. A generation's folder has the products
(wkv6/chunked.py, wkv7/chunked.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .signature import bounds_on_host

CHUNK = 16  # steps of a chunk; in wkv7, 1 / (product of their decays) stays below 2e4, so float32 holds all factors
SEGMENT = 16  # chunks whose products are taken at once and share one saved state, unless a form has its own number


def segment_count(B: int, T: int, sequences: int, segment: int = SEGMENT) -> int:
    """The most states that the chunked form saves for backward: one for each row and segment."""
    packed = 0 if sequences == B else sequences  # each packed sequence may add one chunk that is not full
    return B * -(-(-(-T // CHUNK) + packed) // segment)


def indices(cu_seqlens: Tensor, T: int) -> Tensor:
    """The position (T,) of each of T packed tokens in the padded row, computed without waiting for a GPU."""
    steps = torch.arange(T, device=cu_seqlens.device)
    padded = (cu_seqlens.diff() + CHUNK - 1).div(CHUNK, rounding_mode="floor") * CHUNK
    shifts = padded.cumsum(0) - padded - cu_seqlens[:-1]
    return steps + shifts[torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)]


class ChunkedCall:
    """A call's tensors, laid out in chunks and read a segment at a time. The chunks are the same for every row; in one
    packed row they follow one sequence after another, so that a sequence costs only its own chunks."""

    def __init__(
        self,
        rows: Sequence[Tensor],
        fillers: Sequence[float],
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        segment: int = SEGMENT,
    ) -> None:
        """rows: tensors (B, T, H, N) of one dtype; fillers: a value for each past a sequence's end, so that such steps
        do not change the state; segment: the number of chunks in a segment. starts: a sequence's first chunk -> its
        states; ends: its last chunk -> these."""
        r, self.segment = rows[0], segment
        self.B, self.T, self.H, self.N = r.shape
        self.index: Tensor | None = None
        if cu_seqlens is None:
            self.sequences, self.chunks = self.B, -(-self.T // CHUNK)
            self.starts, self.ends = {0: slice(0, self.B)}, {self.chunks - 1: slice(0, self.B)}
        else:
            bounds = bounds_on_host(cu_seqlens)
            self.sequences, self.chunks, self.starts, self.ends = len(bounds) - 1, 0, {}, {}
            for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
                self.starts[self.chunks] = slice(n, n + 1)
                self.chunks -= (start - end) // CHUNK
                self.ends[self.chunks - 1] = slice(n, n + 1)
            self.index = indices(cu_seqlens, self.T)
        self.dtype = torch.promote_types(r.dtype, torch.float32)
        self.rows = [self.pad(x, filler) for x, filler in zip(rows, fillers, strict=True)]
        self.initial = self.states(state, r)

    def pad(self, x: Tensor, filler: float = 0.0) -> Tensor:
        """(B, T, H, N) -> (B, H, chunks, CHUNK, N), `filler` past a sequence's end."""
        steps = self.chunks * CHUNK
        if self.index is not None:
            padded = x.new_full((self.B, steps, self.H, self.N), filler)
            padded[:, self.index] = x
        elif steps == self.T:
            padded = x
        else:
            padded = F.pad(x, (0, 0, 0, 0, 0, steps - self.T), value=filler)
        return padded.transpose(1, 2).unflatten(2, (self.chunks, CHUNK))

    def cut(self, x: Tensor) -> Tensor:
        """The reverse of pad, for x (B, chunks * CHUNK, H, N)."""
        return x[:, : self.T] if self.index is None else x[:, self.index]

    def states(self, state: Tensor | None, like: Tensor) -> Tensor:
        """`state`, or zeros for None, in the dtype of the computation."""
        shape = (self.sequences, self.H, self.N, self.N)
        return like.new_zeros(shape, dtype=self.dtype) if state is None else state.to(self.dtype)

    def parts(self, states: Tensor, chunks: Mapping[int, slice]) -> dict[int, Tensor]:
        """The states (B H, N, N) of each sequence, by its first or last chunk."""
        return {chunk: states[at].flatten(0, 1) for chunk, at in chunks.items()}

    def segments(self) -> list[tuple[int, int]]:
        """The chunks of each segment: (first, after)."""
        return [(first, min(first + self.segment, self.chunks)) for first in range(0, self.chunks, self.segment)]

    def take(self, x: Tensor, first: int, after: int) -> Tensor:
        """Chunks `first` up to `after` of a padded tensor as (B H, n, C, N)."""
        return x[:, :, first:after].flatten(0, 1).to(self.dtype)

    def taken(self, first: int, after: int) -> list[Tensor]:
        """The same chunks of all rows."""
        return [self.take(x, first, after) for x in self.rows]

    def empty(self, like: Tensor) -> Tensor:
        """An empty tensor for all chunks' results, (B, steps, H, N), in the dtype of `like`."""
        return like.new_empty(self.B, self.chunks * CHUNK, self.H, self.N)

    def put(self, to: Tensor, first: int, after: int, x: Tensor) -> None:
        """Write x (B H, n, C, N) to its chunks' place in `to`."""
        to[:, first * CHUNK : after * CHUNK] = x.reshape(self.B, self.H, -1, self.N).transpose(1, 2)


Parts = Mapping[int, Tensor]  # a chunk -> a state, or its gradient


@dataclass(frozen=True)
class Chunked:
    """The form of an operation whose inputs are as many (B, T, H, N) as there are fillers, the values of a step that
    does not change the state, and after them (H, N).

    prepare(*rows, *shared) -> the operands p of some chunks: rows (B H, n, C, N), shared (B H, 1, 1, N).
    states(p, first, S, starts, ends) -> ((states before each chunk, and what else is read), the state after the last),
    from chunk number `first` on, S before it; starts: a chunk -> the state that it begins with; ends: a chunk -> the
    tensor that gets the state after it.
    output(p, *read) -> y.
    gradients(p, read, dY, dS, first, begun, ended) -> (that of the state before the segment, those of rows and shared);
    dS: that of the state after it; begun: a chunk -> the tensor that gets the gradient of the state before it; ended: a
    chunk -> the gradient of the state after it.
    segment(B) -> the chunks of a segment of B rows.
    """

    fillers: Sequence[float]
    prepare: Callable[..., Any]
    states: Callable[[Any, int, Tensor, Parts, Parts], tuple[tuple[Tensor, ...], Tensor]]
    output: Callable[..., Tensor]
    gradients: Callable[[Any, tuple[Tensor, ...], Tensor, Tensor, int, Parts, Parts], tuple[Tensor, Sequence[Tensor]]]
    segment: Callable[[int], int] = lambda B: SEGMENT

    def unavailable(self, level: str = "") -> None:
        """None: torch alone is enough."""

    def checkpoint_count(self, r: Tensor, sequences: int) -> int:
        """The most states saved for backward."""
        return segment_count(r.shape[0], r.shape[1], sequences, self.segment(r.shape[0]))

    def forward(self, *tensors: Any, save: bool, level: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """tensors: the inputs; state (n, H, N, N) or None; cu_seqlens (n + 1,) int64 or None -> y, final state, the
        states that the segments begin with (none unless `save`)."""
        call, shared, r = *self._call(*tensors), tensors[0]
        count = self.checkpoint_count(r, call.sequences) if save else 0
        checkpoints = call.initial.new_zeros(count, call.H, call.N, call.N)
        kept = checkpoints.view(-1, call.B * call.H, call.N, call.N)
        final, y = torch.empty_like(call.initial), call.empty(r)
        starts, ends = call.parts(call.initial, call.starts), call.parts(final, call.ends)
        S = starts[0]
        for number, (first, after) in enumerate(call.segments()):
            if save:
                kept[number] = S
            p = self.prepare(*call.taken(first, after), *shared)
            read, S = self.states(p, first, S, starts, ends)
            call.put(y, first, after, self.output(p, *read))
        return call.cut(y).contiguous(), final, checkpoints

    def backward(self, *tensors: Any, level: str = "") -> tuple[Tensor, ...]:
        """tensors: forward's, checkpoints, and the gradients of y and of the final state (either None for zeros) -> the
        gradients of the inputs and of the state. The states between chunks come from a second forward pass over a
        segment."""
        *given, checkpoints, gy, gfinal = tensors
        call, shared, r = *self._call(*given), given[0]
        rows = given[: len(self.fillers)]
        kept = checkpoints.view(-1, call.B * call.H, call.N, call.N)
        gy = call.pad(torch.zeros_like(r) if gy is None else gy)
        gfinal, gstate = call.states(gfinal, r), torch.empty_like(call.initial)
        starts, begun = call.parts(call.initial, call.starts), call.parts(gstate, call.starts)
        ended = call.parts(gfinal, call.ends)
        outs, totals = [call.empty(x) for x in rows], [torch.zeros_like(x) for x in shared]
        dS = torch.zeros_like(kept[0])
        for number, (first, after) in reversed(list(enumerate(call.segments()))):
            p = self.prepare(*call.taken(first, after), *shared)
            read, _ = self.states(p, first, kept[number], starts, {})
            dS, gradients = self.gradients(p, read, call.take(gy, first, after), dS, first, begun, ended)
            for out, x in zip(outs, gradients):
                call.put(out, first, after, x)
            for total, x in zip(totals, gradients[len(rows) :]):
                total += x
        of_shared = (x.view(call.B, call.H, call.N).sum(0).to(given[len(rows)].dtype) for x in totals)
        return *(call.cut(x).contiguous() for x in outs), *of_shared, gstate

    def _call(self, *tensors: Any) -> tuple[ChunkedCall, list[Tensor]]:
        """The ChunkedCall of forward's tensors, and the shared ones for each row and head, (B H, 1, 1, N)."""
        *inputs, state, cu_seqlens = tensors
        rows, shared = inputs[: len(self.fillers)], inputs[len(self.fillers) :]
        call = ChunkedCall(rows, self.fillers, state, cu_seqlens, self.segment(rows[0].shape[0]))
        B, H, N = call.B, call.H, call.N
        return call, [x.to(call.dtype).expand(B, H, N).reshape(-1, 1, 1, N) for x in shared]
