"""How the chunked form lays out its steps: sequences padded to whole chunks, and where each begins and ends."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 16  # steps: 1 / (product of their decays) stays below 2e4, so float32 holds all factors without care
SEGMENT = 16  # chunks whose products are taken at once, and that share one saved state


@dataclass(frozen=True)
class Sequence:
    """Some of a call's states, and the chunks of the padded row that belong to them."""

    states: slice
    first: int
    last: int


class Layout:
    """The chunks of a call: of every row alike, or, where one row is packed, of one sequence after another, so that
    sequences of any length cost no more than their own chunks."""

    def __init__(self, shape: torch.Size, cu_seqlens: Tensor | None):
        """shape: (B, T, H, N); cu_seqlens (n + 1,) or None."""
        self.B, self.T, self.H, self.N = shape
        self.index: Tensor | None = None
        if cu_seqlens is None:
            self.states, self.chunks = self.B, -(-self.T // CHUNK)
            self.sequences: tuple[Sequence, ...] = (Sequence(slice(0, self.B), 0, self.chunks - 1),)
            return
        bounds = cu_seqlens.tolist()
        sequences, first = [], 0
        for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
            after = first - (start - end) // CHUNK
            sequences.append(Sequence(slice(n, n + 1), first, after - 1))
            first = after
        self.states, self.chunks, self.sequences = len(sequences), first, tuple(sequences)
        lengths = cu_seqlens.diff()
        shifts = torch.tensor([CHUNK * s.first for s in sequences], device=cu_seqlens.device) - cu_seqlens[:-1]
        self.index = torch.arange(self.T, device=cu_seqlens.device) + shifts.repeat_interleave(lengths)

    @property
    def starts(self) -> dict[int, slice]:
        """A sequence's first chunk -> its states."""
        return {sequence.first: sequence.states for sequence in self.sequences}

    @property
    def ends(self) -> dict[int, slice]:
        """A sequence's last chunk -> its states."""
        return {sequence.last: sequence.states for sequence in self.sequences}

    def pad(self, x: Tensor, filler: float = 0.0) -> Tensor:
        """(B, T, H, N) -> (B, H, chunks, CHUNK, N), `filler` past a sequence's end."""
        steps = self.chunks * CHUNK
        if self.index is not None:
            padded = x.new_full((self.B, steps, self.H, self.N), filler)
            padded[:, self.index] = x
        elif steps == self.T:
            padded = x
        else:
            padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, steps - self.T), value=filler)
        return padded.transpose(1, 2).unflatten(2, (self.chunks, CHUNK))

    def cut(self, x: Tensor) -> Tensor:
        """The reverse of pad, for x (B, chunks * CHUNK, H, N)."""
        return x[:, : self.T] if self.index is None else x[:, self.index]


def segment_count(B: int, T: int, sequences: int) -> int:
    """States that the chunked form keeps for backward, at most: one for each row and segment."""
    packed = 0 if sequences == B else sequences  # a packed sequence may add one chunk that is not full
    return B * -(-(-(-T // CHUNK) + packed) // SEGMENT)
