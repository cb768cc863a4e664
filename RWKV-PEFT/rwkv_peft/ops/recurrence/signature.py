"""Which tensors a recurrence takes: what checks, operators and kernels are made of."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Signature:
    """An operation's inputs in the order of its arguments, after which come a state and cu_seqlens."""

    op: str
    rows: tuple[str, ...]  # the names of those (B, T, H, N), "v" among them
    shared: tuple[str, ...]  # of those (H, N), which follow, float32 for the kernels
    state_rows: str  # which dimension the rows of a state (H, N, N) are, "key" or "value"
    further: tuple[str, ...] = ()  # what else its CUDA kernels may be given

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """All."""
        return self.rows + self.shared

    @cached_property
    def gradients(self) -> tuple[str, ...]:
        """The names of the inputs' gradients."""
        return tuple(f"g{name}" for name in self.inputs)


def sequences_of(rows: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences a call has, given one of its (B, T, H, N)."""
    return rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
