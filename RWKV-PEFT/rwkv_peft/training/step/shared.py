"""The training steps of ranks that share rows: each computes a part of a row's time, and hands states on (relay.py)."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ...config import Objective
from ...models.parts import HeadFunction, LanguageModel
from ...objectives.next_token import NextToken
from .forked import no_head
from .relay import LEAST, Line, Relay, in_flight
from .segments import Segment, end_of, part_of
from .steps import Batch, Segments, Whole, add, delivered

GRAIN = 32  # positions whose multiples kernels compute as they compute the whole row


class SharedRows(Whole):
    """Compute this rank's part of all positions of a batch, in segments that follow each other along the line
    (in_flight). All go forward, and then all go back, so that ranks wait only at both ends. No pass is repeated, and
    activations take no more memory than those of one segment. least: see in_flight."""

    def __init__(self, objective: Objective, line: Line, teacher: nn.Module | None = None, least: int = LEAST) -> None:
        super().__init__(objective, self.along, teacher=teacher)
        self.line, self.teacher_fn, self.least = line, self.along, least

    def sent(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        whole, parts = padded(batch, self.line.parts), self.line.parts
        T = whole["mask"].shape[1]
        number = in_flight(parts, self.line.blocks, T, self.least)
        length = T if number == 1 else -(-T // (number * parts * GRAIN)) * parts * GRAIN
        return together([segment.to(device) for segment in own_parts(whole, length, self.line)])

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        """See Step.loss. Its gradients are those of a backward pass that is over, because engines exchange gradients
        between ranks as they come, and ranks that share rows come to a block at different times."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = self.forward(model, batch, count)
        found = torch.autograd.grad(loss, [*parameters, self.line.anchor], allow_unused=True)
        gradients = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(parameters, found)]
        return delivered(loss.detach(), gradients, parameters)

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.forward(model, batch, 1)

    def forward(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        """The sum of the segments' losses, without data files' shares; backward begins at the last on every rank."""
        self.line.open_ring()
        total, measures = torch.zeros((), device=batch["tokens"].device), dict[str, torch.Tensor]()
        for part in cast(Mapping[str, Any], batch)["segments"]:
            fields = {name: value for name, value in part._asdict().items() if value is not None}
            mask = torch.ones_like(part.counted, dtype=torch.bool)
            total = total + super().loss(model, fields | {"part": part, "mask": mask}, count)
            measures = {name: measures.get(name, 0) + found for name, found in self.measures.items()}
        self.measures = measures
        return total

    def along(self, model: nn.Module, batch: Batch, head: HeadFunction) -> torch.Tensor:
        """Head's result after a model's forward over this rank's part of a batch."""
        part = cast(Mapping[str, Any], batch)["part"]
        return run(model, part, head, Relay(self.line, cast(LanguageModel, model), part))


class SharedSegments(Segments):
    """Compute this rank's part of each segment of a batch; others may still be at the segment before."""

    def __init__(self, length: int, line: Line, objective: NextToken) -> None:
        super().__init__(max(1, length // line.parts) * line.parts, objective=objective)
        self.line = line

    def sent(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        own = own_parts(padded(batch, self.line.parts), self.length, self.line)
        return together([segment.to(device) for segment in own])

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        self.line.open_ring()
        segments = self.segments(batch)
        seeds = torch.randint(2**62, (len(segments),)).tolist()  # so a segment draws the same in both passes
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        plain = cast(LanguageModel, model)
        relays = [Relay(self.line, plain, segment, keep=segment is not segments[-1]) for segment in segments]
        for segment, relay, seed in zip(segments[:-1], relays, seeds):
            torch.manual_seed(seed)
            with torch.no_grad():
                run(model, segment, no_head, relay)
            relay.again = True
        sums: list[torch.Tensor] = []
        total = torch.zeros((), device=batch["tokens"].device)
        for segment, relay, seed in reversed([*zip(segments, relays, seeds)]):
            torch.manual_seed(seed)
            loss = run(model, segment, self.head(segment, count), relay)
            found = torch.autograd.grad(loss, [*parameters, self.line.anchor], allow_unused=True)
            add(sums, found[:-1], parameters)
            total += loss.detach()
            relay.kept = None
        return delivered(total, sums, parameters)

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self.line.open_ring()
        total = torch.zeros((), device=batch["tokens"].device)
        for segment in self.segments(batch):
            relay = Relay(self.line, cast(LanguageModel, model), segment)
            total += run(model, segment, self.head(segment, 1), relay)
        return total


def together(segments: list[Segment]) -> dict[str, Any]:
    """Join a rank's segments into what a step needs: themselves, and their tokens, mask and weights as one batch's."""
    tokens = torch.cat([segment.tokens for segment in segments], 1)
    counted = torch.cat([segment.counted for segment in segments])
    found = {"segments": segments, "tokens": tokens, "mask": torch.ones_like(counted, dtype=torch.bool)}
    weights = [segment.weights.flatten()[segment.counted] for segment in segments if segment.weights is not None]
    return found | {"weights": torch.cat(weights)} if weights else found


def run(model: nn.Module, segment: Segment, head: HeadFunction, relay: Relay) -> torch.Tensor:
    return model(segment.tokens, None, segment.cu_seqlens, head, keep=False, relay=relay)[0]


def padded(batch: Batch, multiple: int) -> Batch:
    """Lengthen the rows of a batch to a multiple, by tokens that do not count behind their last."""
    missing = -batch["mask"].shape[1] % multiple
    if not missing:
        return batch
    names = [name for name in ("tokens", "targets", "mask", "weights") if name in batch]
    found = {name: F.pad(batch[name], (0, missing)) for name in names}
    if "cu_seqlens" in batch:
        found["cu_seqlens"] = torch.cat([batch["cu_seqlens"][:-1], batch["cu_seqlens"][-1:] + missing])
    return found


def own_parts(batch: Batch, length: int, line: Line) -> list[Segment]:
    """This rank's part of each segment of `length` positions; both are multiples of the line's parts."""
    T, found = batch["mask"].shape[1], []
    for start in range(0, end_of(batch), length):
        size = (min(start + length, T) - start) // line.parts
        first = start + line.part * size
        found.append(part_of(batch, first, first + size))
    if line.part == line.parts - 1:  # nothing follows the last segment, though the row may go on
        found[-1] = found[-1]._replace(goes_on=False)
    return found
