"""The tensors that a recurrence takes; checks, operators and kernels' arguments follow from it."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Signature:
    """An operation's inputs in the order of its arguments; a state and cu_seqlens follow them."""

    op: str
    rows: tuple[str, ...]  # the names of the inputs (B, T, H, N), "v" among them
    shared: tuple[str, ...]  # the names of the inputs (H, N), which follow; float32 for the kernels
    state_rows: str  # the dimension that the rows of a state (H, N, N) stand for, "key" or "value"

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of all inputs."""
        return self.rows + self.shared

    @cached_property
    def gradients(self) -> tuple[str, ...]:
        """The names of the inputs' gradients."""
        return tuple(f"g{name}" for name in self.inputs)


def sequences_of(rows: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences in a call, given one of its tensors (B, T, H, N)."""
    return rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
