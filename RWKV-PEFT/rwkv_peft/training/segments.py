"""A batch cut into segments of time, each of which begins where the one before it ended."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..data.batches import positions
from ..models.state import State
from ..ops.recurrence.checks import vouch


class Segment(NamedTuple):
    """tokens and targets (B, T) of some positions of a batch, counted (n,), which of the B * T targets count, and
    cu_seqlens (n + 1,) where it is packed; carries: whether its first sequence goes on from the segment before (every
    row, where nothing is packed)."""

    tokens: torch.Tensor
    targets: torch.Tensor
    counted: torch.Tensor
    cu_seqlens: torch.Tensor | None
    carries: bool

    def to(self, device: torch.device) -> "Segment":
        """A copy of one that is on the CPU, on a device, to which it may be under way yet."""
        tokens, targets, counted = (sent(x, device) for x in self[:3])
        bounds = None
        if self.cu_seqlens is not None:
            bounds = sent(self.cu_seqlens, device)
            vouch(bounds, self.cu_seqlens, tokens.shape[1])
        return Segment(tokens, targets, counted, bounds, self.carries)

    def state_after(self, state: State) -> State:
        """The State of the sequences that may go on, of all of the segment's: the rows, or the last that is packed."""
        if self.cu_seqlens is None:
            return state
        return State(type(layer)(*(tensor[-1:] for tensor in layer)) for layer in state)


def segments_of(batch: Mapping[str, torch.Tensor], length: int) -> list[Segment]:
    """A batch (TrainBatches) -> its segments of `length` positions; those behind the last counted target are left out,
    but for the first."""
    mask = batch["mask"]
    counted = mask.any(0).nonzero()
    end = int(counted[-1]) + 1 if len(counted) else 1
    bounds = None if batch.get("cu_seqlens") is None else batch["cu_seqlens"].tolist()
    return [_segment(batch, start, min(start + length, mask.shape[1]), bounds) for start in range(0, end, length)]


def filler(segment: Segment) -> Segment:
    """A segment of one token that counts nothing, like another's."""
    one = segment.tokens[:, :1]
    bounds = None
    if segment.cu_seqlens is not None:
        bounds = torch.arange(2, device=one.device)
        vouch(bounds, torch.arange(2), 1)
    return Segment(torch.zeros_like(one), torch.zeros_like(one), segment.counted[:0], bounds, False)


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device of a tensor on the CPU, for which nobody waits."""
    return x.to(device) if device.type == "cpu" else x.contiguous().pin_memory().to(device, non_blocking=True)


def _segment(batch: Mapping[str, torch.Tensor], start: int, stop: int, bounds: list[int] | None) -> Segment:
    tokens, targets, mask = (batch[name][:, start:stop] for name in ("tokens", "targets", "mask"))
    if bounds is None:
        return Segment(tokens, targets, positions(mask), None, start > 0)
    inner = [bound - start for bound in bounds if start < bound < stop]
    cu_seqlens = batch["cu_seqlens"].new_tensor([0, *inner, stop - start])
    return Segment(tokens, targets, positions(mask), cu_seqlens, start not in bounds)
