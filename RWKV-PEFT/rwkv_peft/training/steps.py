"""What a training step does with a batch: all positions at once, or segment by segment with the states carried over.

Both give the loss of a batch, differentiable in the parameters that train, and its sum without gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from ..config import ModelConfig
from ..models.parts import HeadFunction
from ..models.state import LayerState, State
from .loss import linear_cross_entropy
from .segments import Segment, filler, segments_of

Batch = Mapping[str, torch.Tensor]
Tensors = Sequence[torch.Tensor]
Gradient = Sequence[torch.Tensor | None]  # of some tensors, None for those that it does not reach
Way = Callable[[nn.Module, Batch, HeadFunction], torch.Tensor]  # through a model: (model, batch, head) -> head's result


class Step(ABC):
    """What a run is given to train and validate with. batch is one of TrainBatches or EvalBatches; count is the number
    that the sum of the losses, of each counted token or each pair of answers, is divided by.

    measures: what else was found of the last batch, by name, 0-dim tensors that are divided as its loss is.
    """

    measures: Mapping[str, torch.Tensor] = MappingProxyType({})

    def sent(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """What the step needs besides the tensors of a batch, which is on the CPU yet: found there, where nobody has to
        wait for a GPU, and sent to the device."""
        return {}

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        """A batch's loss (), differentiable in the parameters that train."""

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum of a batch's losses ()."""
        return self.loss(model, batch, 1)

    @abstractmethod
    def items(self, batch: Batch) -> torch.Tensor:
        """How many losses a batch has, ()."""


class OfTokens(Step):
    """What the steps share whose losses are those of tokens."""

    def items(self, batch: Batch) -> torch.Tensor:
        return batch["mask"].sum()


def straight(model: nn.Module, batch: Batch, head: HeadFunction) -> torch.Tensor:
    """The Way of a model's own forward."""
    result: torch.Tensor = model(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"), head=head, keep=False)[0]
    return result


class Whole(OfTokens):
    """All positions of a batch at once, by a Way."""

    def __init__(self, way: Way = straight) -> None:
        self.way = way

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        return self.way(model, batch, loss_of(batch, count))


def loss_of(batch: Batch, count: float) -> Callable[..., torch.Tensor]:
    """The loss of a batch as a model's head takes it: (x, weight of the head) -> loss."""
    return partial(linear_cross_entropy, targets=batch["targets"], counted=batch["counted"], count=count)


class Gradients(NamedTuple):
    """What going back through a segment gives: the gradients of the parameters and of the state before it (None where
    there are none), the loss, and the state after it."""

    parameters: Gradient
    before: Gradient
    loss: torch.Tensor
    after: State


class Segments(OfTokens):
    """Segments of `length` positions, whose activations are in memory one segment at a time.

    The gradients are those of the whole row, up to rounding: a first pass keeps the state at each border, and a second
    one goes back from the last segment to the first, computes each anew and carries the gradient of its initial state
    to the one before. With bptt above 0 that gradient stops at every bptt-th border. together: every rank goes through
    the same number of segments, as ZeRO-3's collective operations need.

    Under ZeRO-3 each module that is entered, forward and backward, may be a collective operation. So a segment that
    begins anew has a State too, of no sequence, and where nothing goes on from one its State has a gradient too, of
    zeros: autograd enters the same modules in the same order whatever a rank's segments hold.
    """

    def __init__(self, length: int, bptt: int = 0, together: bool = False) -> None:
        self.length, self.bptt, self.together = length, bptt, together

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        segments = self.segments(batch)
        seeds = torch.randint(2**62, (len(segments),)).tolist()  # a segment draws the same in both passes
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sums: list[torch.Tensor] = []
        total, none = torch.zeros((), device=batch["tokens"].device), of_none(model)
        state, group = none, self.bptt or len(segments)
        for first in range(0, len(segments), group):
            chain, draws = segments[first : first + group], seeds[first : first + group]
            befores = self.states(model, chain, draws, state, none)
            gradient: Gradient = ()
            for position in reversed(range(len(chain))):
                torch.manual_seed(draws[position])
                found = go_back(model, chain[position], befores[position], gradient, parameters, count)
                gradient, total = found.before if chain[position].carries else (), total + found.loss
                add(sums, found.parameters, parameters)
                if position == len(chain) - 1:
                    after = found.after
            state = following(segments, first + group, after, none)
        return delivered(total, sums, parameters)

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        total, none = torch.zeros((), device=batch["tokens"].device), of_none(model)
        state = none
        segments = self.segments(batch)
        for position, segment in enumerate(segments):
            loss, after = run(model, segment, state, 1)
            total, state = total + loss, following(segments, position + 1, kept(segment.state_after(after)), none)
        return total

    def sent(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        return {"segments": [segment.to(device) for segment in segments_of(batch, self.length)]}

    def segments(self, batch: Mapping[str, Any]) -> list[Segment]:
        """The batch's segments, and as many fillers as the other ranks have more."""
        segments: list[Segment] = batch.get("segments") or segments_of(batch, self.length)
        if self.together and dist.is_initialized():
            most = torch.tensor(len(segments), device=batch["tokens"].device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            segments += [filler(segments[0])] * (int(most) - len(segments))
        return segments

    @torch.no_grad()
    def states(
        self, model: nn.Module, chain: Sequence[Segment], draws: Sequence[int], state: State, none: State
    ) -> list[State]:
        """The State before each segment of a chain, from the one before the first, and `none` of no sequence."""
        befores = [state]
        for position, segment in enumerate(chain[:-1]):
            torch.manual_seed(draws[position])
            after = model(segment.tokens, befores[-1], segment.cu_seqlens, head=no_head)[1]
            befores.append(following(chain, position + 1, kept(segment.state_after(after)), none))
        return befores


def no_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What stands for the logits where only the state is asked for."""
    return x.new_zeros(())


def of_none(model: nn.Module) -> State:
    """The State of no sequence, from which all of a LanguageModel's sequences begin."""
    first = next(model.parameters())
    return State.zeros(cast(ModelConfig, model.config), 0, first.device, first.dtype)


def following(segments: Sequence[Segment], position: int, after: State, none: State) -> State:
    """The State before the segment at a position, from what the one before left; `none` where it begins anew."""
    return after if position < len(segments) and segments[position].carries else none


def kept(state: State) -> State:
    """A State in memory of its own: shifts are views of all the inputs of which they are the last."""
    return State(LayerState(*(tensor.detach().clone() for tensor in layer)) for layer in state)


def run(model: nn.Module, segment: Segment, state: State | None, count: float) -> tuple[torch.Tensor, State]:
    head = partial(linear_cross_entropy, targets=segment.targets, counted=segment.counted, count=count)
    loss, after = model(segment.tokens, state, segment.cu_seqlens, head=head)
    return loss, after


def go_back(
    model: nn.Module, segment: Segment, before: State, gradient: Gradient, parameters: Tensors, count: float
) -> Gradients:
    """The Gradients of a segment from the State before it; gradient is that of the tensors of the State after it, ()
    where nothing goes on from there."""
    inputs = [tensor.detach().requires_grad_() for layer in before for tensor in layer]
    start = State(LayerState(*inputs[i : i + 3]) for i in range(0, len(inputs), 3))
    loss, state = run(model, segment, start, count)
    after = segment.state_after(state)
    ends = [tensor for layer in after for tensor in layer]
    given = [torch.zeros_like(end) if grad is None else grad for end, grad in zip_longest(ends, gradient)]
    pairs = [(loss, None), *zip(ends, given)]
    outputs, grads = zip(*((output, grad) for output, grad in pairs if output.requires_grad))
    found = torch.autograd.grad(outputs, [*parameters, *inputs], grads, allow_unused=True)
    return Gradients(found[: len(parameters)], found[len(parameters) :], loss.detach(), kept(after))


def add(sums: list[torch.Tensor], gradients: Gradient, parameters: Tensors) -> None:
    """Add gradients to the sums, which are empty at first, and float32 for smaller dtypes: many segments add up."""
    if not sums:
        shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in parameters]  # ZeRO-3's are cut
        wide = torch.promote_types(torch.float32, parameters[0].dtype)
        sums += [torch.zeros(shape, dtype=wide, device=parameters[0].device) for shape in shapes]
    for total, gradient in zip(sums, gradients):
        if gradient is not None:
            total += gradient


def delivered(loss: torch.Tensor, gradients: Tensors, parameters: Tensors) -> torch.Tensor:
    """A loss whose gradients are known already, and are handed to the parameters when it is differentiated: once for
    each, which is what ZeRO's bookkeeping asks for."""
    cut = [p for p in parameters if p.shape != getattr(p, "ds_shape", p.shape)]
    if cut:  # by ZeRO-3, which does so again behind the backward pass; a gradient needs the shape
        cut[0].all_gather(param_list=cut)  # type: ignore[attr-defined]
    result: torch.Tensor = Delivered.apply(loss, gradients, *parameters)
    return result


class Delivered(torch.autograd.Function):
    """The loss as it is; backward gives the parameters gradients that were computed before."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: Tensors, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients, ctx.dtypes = gradients, [parameter.dtype for parameter in parameters]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *((total * grad).to(dtype) for total, dtype in zip(ctx.gradients, ctx.dtypes))
