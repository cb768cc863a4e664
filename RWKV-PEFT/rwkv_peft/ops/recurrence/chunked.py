"""A recurrence's chunked form in plain torch as its backend, for any device: products of matrices instead of single
steps, a segment of chunks at a time. A generation's folder has the products (wkv6/chunked.py, wkv7/chunked.py)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chunks import SEGMENT, Call, segment_count

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

    def _call(self, *tensors: Any) -> tuple[Call, list[Tensor]]:
        """The Call of forward's tensors, and the shared ones for each row and head, (B H, 1, 1, N)."""
        *inputs, state, cu_seqlens = tensors
        rows, shared = inputs[: len(self.fillers)], inputs[len(self.fillers) :]
        call = Call(rows, self.fillers, state, cu_seqlens, self.segment(rows[0].shape[0]))
        B, H, N = call.B, call.H, call.N
        return call, [x.to(call.dtype).expand(B, H, N).reshape(-1, 1, 1, N) for x in shared]
