"""The layout of steps in the chunked forms: sequences padded to whole chunks, and where each begins and ends."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import bounds_on_host

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


class Call:
    """A call's tensors, laid out in chunks and read a segment at a time. The chunks are the same for every row, or for
    one packed row those of one sequence after another, so that a sequence costs only its own chunks."""

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
