"""Cut a batch into segments of time; each begins at the position at which the one before it ended."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...data.samples import positions
from ...models.state import State
from ...ops.recurrence.signature import vouch


class Segment(NamedTuple):
    """Some positions of a batch: tokens and targets (B, T); counted (n,), the indices of the targets that count among
    the B * T; and cu_seqlens (sequences + 1,) if the batch is packed, else None. carries: whether the first sequence
    goes on from the segment before (every row, if nothing is packed); goes_on: whether the last goes on after it;
    weights (B, T): how much targets count, None if all count alike."""

    tokens: torch.Tensor
    targets: torch.Tensor
    counted: torch.Tensor
    cu_seqlens: torch.Tensor | None
    carries: bool
    goes_on: bool = False
    weights: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Segment":
        """Copy a segment from the CPU to a device; the copy may still be on its way on return."""
        tokens, targets, counted = (sent(x, device) for x in self[:3])
        bounds = None
        if self.cu_seqlens is not None:
            bounds = sent(self.cu_seqlens, device)
            vouch(bounds, self.cu_seqlens, tokens.shape[1])
        weights = None if self.weights is None else sent(self.weights, device)
        return self._replace(tokens=tokens, targets=targets, counted=counted, cu_seqlens=bounds, weights=weights)

    def state_after(self, state: State) -> State:
        """Pick from the State after the segment what may go on: all rows, or the last packed sequence."""
        if self.cu_seqlens is None:
            return state
        return State(type(layer)(*(tensor[-1:] for tensor in layer)) for layer in state)


def segments_of(batch: Mapping[str, torch.Tensor], length: int) -> list[Segment]:
    """Cut a batch -> its segments of `length` positions, up to the last target that counts; one at least."""
    T = batch["mask"].shape[1]
    return [part_of(batch, start, min(start + length, T)) for start in range(0, end_of(batch), length)]


def end_of(batch: Mapping[str, torch.Tensor]) -> int:
    """The position behind the last target of a batch that counts, 1 at least."""
    counted = batch["mask"].any(0).nonzero()
    return int(counted[-1]) + 1 if len(counted) else 1


def filler(segment: Segment) -> Segment:
    """Make a segment of one token a row that counts nothing, packed if the given one is."""
    one = segment.tokens[:, :1]
    bounds = None
    if segment.cu_seqlens is not None:
        bounds = torch.arange(2, device=one.device)
        vouch(bounds, torch.arange(2), 1)
    weights = None if segment.weights is None else segment.weights[:, :1]
    zeros = torch.zeros_like(one)
    return Segment(zeros, zeros, segment.counted[:0], bounds, carries=False, weights=weights)


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device, without waiting for the copy if that is a GPU."""
    return x.to(device) if device.type != "cuda" else x.contiguous().pin_memory().to(device, non_blocking=True)


def part_of(batch: Mapping[str, torch.Tensor], start: int, stop: int) -> Segment:
    """Cut the positions from start to stop out of a batch."""
    tokens, targets, mask = (batch[name][:, start:stop] for name in ("tokens", "targets", "mask"))
    weights = batch["weights"][:, start:stop] if "weights" in batch else None
    packed = batch.get("cu_seqlens")
    bounds = [0, batch["mask"].shape[1]] if packed is None else packed.tolist()
    inner = [bound - start for bound in bounds if start < bound < stop]
    cu_seqlens = None if packed is None else packed.new_tensor([0, *inner, stop - start])
    borders = start not in bounds, stop not in bounds
    return Segment(tokens, targets, positions(mask), cu_seqlens, *borders, weights)
