"""Rows in segments of time (--chunk_ctx): each begins at the position at which the one before it ended.

The activations of one segment at a time are in memory: rows of any length train.
"""

from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from ...config import ModelConfig
from ...data.samples import positions
from ...models.parts import HeadFunction
from ...models.state import State
from ...objectives.next_token import NextToken
from ...ops.recurrence.signature import check_copy
from .shared_prefix import no_head
from .steps import NEXT_TOKEN, Batch, Gradient, Step, Tensors, add_gradients, to_device, trainable, with_gradients


class Segment(NamedTuple):
    """Some positions of a batch.

    tokens and targets (B, T); counted (n,), the indices of the targets that count among the B * T; cu_seqlens
    (sequences + 1,) if the batch is packed; carries: the first sequence goes on from the segment before (every row, if
    nothing is packed); goes_on: the last one goes on after it; weights (B, T) of the targets, None if all count alike.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    counted: torch.Tensor
    cu_seqlens: torch.Tensor | None
    carries: bool
    goes_on: bool = False
    weights: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Segment":
        """Copy a segment from the CPU to a device, without waiting for a GPU."""
        return Segment(**to_device(self._asdict(), device))

    def state_after(self, state: State) -> State:
        """The part of the State after the segment that may go on: all rows, or the last packed sequence."""
        if self.cu_seqlens is None:
            return state
        return State(type(layer)(*(tensor[-1:] for tensor in layer)) for layer in state)


def segments_of(batch: Batch, length: int) -> list[Segment]:
    """Cut a batch -> its segments of `length` positions, up to the last target that counts; one at least."""
    T = batch["mask"].shape[1]
    return [part_of(batch, start, min(start + length, T)) for start in range(0, end_of(batch), length)]


def end_of(batch: Batch) -> int:
    """The position behind the last target of a batch that counts, 1 at least."""
    counted = batch["mask"].any(0).nonzero()
    return int(counted[-1]) + 1 if len(counted) else 1


def part_of(batch: Batch, start: int, stop: int) -> Segment:
    """The positions from start to stop of a batch."""
    tokens, targets, mask = (batch[name][:, start:stop] for name in ("tokens", "targets", "mask"))  # (B, stop - start)
    weights = batch["weights"][:, start:stop] if "weights" in batch else None
    packed = batch.get("cu_seqlens")
    bounds = [0, batch["mask"].shape[1]] if packed is None else packed.tolist()
    # Bounds at start or stop are left out: they are added below, and no sequence may be empty.
    inner = [bound - start for bound in bounds if start < bound < stop]
    cu_seqlens = None if packed is None else packed.new_tensor([0, *inner, stop - start])
    borders = start not in bounds, stop not in bounds
    return Segment(tokens, targets, positions(mask), cu_seqlens, *borders, weights)


def filler(segment: Segment) -> Segment:
    """A segment of one token a row that counts nothing, on the same device, packed if the given one is."""
    zeros = torch.zeros_like(segment.tokens[:, :1])
    bounds = None
    if segment.cu_seqlens is not None:
        bounds = torch.arange(2, device=zeros.device)  # [0, 1]: one sequence of one token
        check_copy(bounds, torch.arange(2), 1)
    weights = None if segment.weights is None else segment.weights[:, :1]
    return Segment(zeros, zeros, segment.counted[:0], bounds, carries=False, weights=weights)


class Segments(Step):
    """A batch in segments of `length` positions, with the activations of one segment at a time in memory.

    The gradients equal the whole row's, up to rounding. A first pass caches the state at each border. A second pass
    goes back from the last segment to the first. It computes each again and carries the gradient of its initial state
    to the segment before. together: every rank computes the same number of segments, as ZeRO-3's collective operations
    need.

    Under ZeRO-3 each module that is entered, forward and backward, may be a collective operation. So a segment that
    begins anew gets a State too, of no sequence; and a State that nothing goes on from gets a gradient too, of
    zeros. Autograd then enters the same modules in the same order whatever a rank's segments hold.
    """

    objective: NextToken

    def __init__(self, length: int, together: bool = False, objective: NextToken = NEXT_TOKEN) -> None:
        self.length, self.together, self.objective = length, together, objective

    def prepare_inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        segments = [segment.to(device) for segment in segments_of(batch, self.length)]
        return to_device(batch, device) | {"segments": segments}

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        segments = self.segments(batch)
        seeds = torch.randint(2**62, (len(segments),)).tolist()  # so a segment's dropout is the same in both passes
        states, parameters = self.states(model, segments, seeds), trainable(model)
        sums: list[torch.Tensor] = []
        total = torch.zeros((), device=batch["tokens"].device)
        gradient: Gradient = ()
        for segment, seed, state in reversed([*zip(segments, seeds, states)]):
            torch.manual_seed(seed)
            loss, gradients, before = go_back(model, segment, state, gradient, parameters, self.head(segment, count))
            # A segment that begins anew cuts the way back: what came before it is another row's.
            gradient, total = before if segment.carries else (), total + loss
            add_gradients(sums, gradients, parameters)
        return with_gradients(total, sums, parameters)

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        total, none = torch.zeros((), device=batch["tokens"].device), no_sequences(model)
        state = none
        segments = self.segments(batch)
        for position, segment in enumerate(segments):
            loss, after = forward(model, segment, state, self.head(segment, 1))
            total, state = total + loss, state_before(segments, position + 1, copied(segment.state_after(after)), none)
        return total

    def segments(self, batch: Batch) -> list[Segment]:
        """The batch's segments; with `together` also fillers, up to the largest number of segments on any rank."""
        segments: list[Segment] = batch.get("segments") or segments_of(batch, self.length)
        if self.together and dist.is_initialized():
            # On the device, because NCCL adds up nothing on CPUs.
            most = torch.tensor(len(segments), device=batch["tokens"].device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            segments += [filler(segments[0])] * (int(most) - len(segments))
        return segments

    def head(self, segment: Segment, count: float) -> HeadFunction:
        """A segment's part of the loss as a function for the model's head."""
        return self.objective.head(segment.targets, segment.counted, count, segment.weights)

    @torch.no_grad()
    def states(self, model: nn.Module, segments: Sequence[Segment], seeds: Sequence[int]) -> list[State]:
        """The State before each segment."""
        states = [none := no_sequences(model)]
        for position, segment in enumerate(segments[:-1]):
            torch.manual_seed(seeds[position])
            after = forward(model, segment, states[-1], no_head)[1]
            states.append(state_before(segments, position + 1, copied(segment.state_after(after)), none))
        return states


def no_sequences(model: nn.Module) -> State:
    """The State of no sequence, from which a LanguageModel begins all sequences anew."""
    first = next(model.parameters())
    return State.zeros(cast(ModelConfig, model.config), 0, first.device, first.dtype)


def state_before(segments: Sequence[Segment], position: int, after: State, none: State) -> State:
    """The State before the segment at `position`: `after` if it goes on from the one before, else `none`."""
    return after if position < len(segments) and segments[position].carries else none


def copied(state: State) -> State:
    """A detached copy of a State. Its shifts are views of all inputs and would keep these in memory."""
    return state.each(lambda name, tensor: tensor.detach().clone())


def forward(model: nn.Module, segment: Segment, state: State | None, head: HeadFunction) -> tuple[torch.Tensor, State]:
    """Head's result and the State after a segment."""
    result, after = model(segment.tokens, state, segment.cu_seqlens, head=head)
    return result, after


def go_back(
    model: nn.Module, segment: Segment, before: State, gradient: Gradient, parameters: Tensors, head: HeadFunction
) -> tuple[torch.Tensor, Gradient, Gradient]:
    """(a segment's loss, the gradients of the parameters, those of the State before it).

    They go back from its loss and from the gradient of its last State (() for none).
    """
    # Leaves of a graph of this segment's own, so that the gradient stops at its beginning.
    inputs = [tensor.detach().requires_grad_() for layer in before for tensor in layer]
    rest = iter(inputs)
    start = State(layer._make(islice(rest, len(layer))) for layer in before)
    loss, state = forward(model, segment, start, head)
    ends = [tensor for layer in segment.state_after(state) for tensor in layer]
    # zip_longest: the last segment has no gradient from behind, and gets zeros for each tensor of its State.
    end_gradients = [torch.zeros_like(end) if grad is None else grad for end, grad in zip_longest(ends, gradient)]
    pairs = [(loss, None), *zip(ends, end_gradients)]
    # A State that depends on nothing that trains has no graph, and autograd refuses it.
    outputs, grads = zip(*((output, grad) for output, grad in pairs if output.requires_grad))
    gradients = torch.autograd.grad(outputs, [*parameters, *inputs], grads, allow_unused=True)
    return loss.detach(), gradients[: len(parameters)], gradients[len(parameters) :]
