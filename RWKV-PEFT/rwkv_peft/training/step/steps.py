"""The training steps: compute an objective's loss of a batch at all positions at once, or in segments with the states
carried over.

Both give the loss of a batch, differentiable in the parameters that train, and its sum without gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from ...adapters.layer import untrained
from ...config import ModelConfig, Objective
from ...config.objective import Passes
from ...models.parts import HeadFunction
from ...models.state import State
from ...objectives.next_token import NextToken
from .contexts import Contexts, seen_by_teacher
from .forked import forked, no_head, on_device, state_before
from .segments import Segment, filler, segments_of

Batch = Mapping[str, torch.Tensor]
Tensors = Sequence[torch.Tensor]
Gradient = Sequence[torch.Tensor | None]  # one for each tensor, None for those that it does not reach
ForwardFunction = Callable[[nn.Module, Batch, HeadFunction], torch.Tensor]  # (model, batch, head) -> head's result
NEXT_TOKEN = NextToken()


class Step(ABC):
    """The computation that a run trains and validates with. batch is one of TrainBatches or EvalBatches; count divides
    the sum of the losses, which are those of the objective's items.

    measures: the objective's figures for the last batch, by name: 0-dim tensors, divided as its loss is. figures: those
    of the optimizer step before, over all ranks and micro batches; {} in the first.
    """

    objective: Objective
    measures: Mapping[str, torch.Tensor] = MappingProxyType({})
    figures: Mapping[str, float] = MappingProxyType({})

    def sent(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return what the step needs besides a batch's tensors, sent to the device. It is computed while the batch is
        still on the CPU, so that nobody waits for a GPU."""
        return {}

    def completed(self, model: nn.Module, batch: Batch) -> Batch:
        """A batch with all that its loss reads; of some objectives that is what the model says."""
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        """A batch's loss (), differentiable in the parameters that train."""

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum of a batch's losses ()."""
        return self.loss(model, batch, 1)

    def keep(self, folder: Path, rank: int) -> None:  # noqa: B027 (most have nothing to keep)
        """Write what a resumed run needs of this rank, besides weights, into a checkpoint."""

    def restore(self, checkpoint: Path) -> None:  # noqa: B027 (most have nothing to restore)
        """Read what `keep` wrote on all ranks."""

    def items(self, batch: Batch) -> torch.Tensor:
        """The number of losses that a batch has, ()."""
        return self.objective.items(batch)


def plain_forward(model: nn.Module, batch: Batch, head: HeadFunction) -> torch.Tensor:
    """Head's result after the model's own forward over a batch, which may be laid out by `forked`."""
    state = state_before(model, batch) if "shared" in batch else None
    return model(batch["tokens"], state, batch.get("cu_seqlens"), head, keep=False)[0]


class Whole(Step):
    """Compute all positions of a batch at once.

    forward_fn runs the model, with its adapters off for reference log-probabilities. Teacher log-probabilities come
    from `stored`, from `teacher`, or without either from the model with its adapters off. group: the number of packed
    documents that share a prompt, which is computed once for them; 0: none. contexts caches the teacher's states after
    contexts; None: it reads whole rows."""

    teacher_fn: ForwardFunction = staticmethod(plain_forward)

    def __init__(
        self,
        objective: Objective = NEXT_TOKEN,
        forward_fn: ForwardFunction = plain_forward,
        group: int = 0,
        teacher: nn.Module | None = None,
        stored: Callable[[Batch], Batch] | None = None,
        contexts: Contexts | None = None,
    ) -> None:
        self.objective, self.forward_fn, self.group, self.teacher = objective, forward_fn, group, teacher
        self.stored, self.contexts = stored, contexts
        if contexts is not None:
            self.teacher_fn = contexts.through

    def sent(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        laid = forked(batch, self.group) if self.group else {}
        if self.stored is not None:
            laid |= self.stored(batch)
        if self.contexts is None:
            return on_device(laid, device)
        return on_device(laid | self.contexts.laid(batch), device) | {"teacher_contexts": self.contexts.texts(batch)}

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        @torch.no_grad()
        def through_base(head: HeadFunction) -> torch.Tensor:
            with untrained(model):
                return self.forward_fn(model, batch, head)

        @torch.no_grad()
        def through_teacher(head: HeadFunction) -> torch.Tensor:
            if self.teacher is not None:
                return self.teacher_fn(self.teacher, seen_by_teacher(batch), head)
            with untrained(model):
                return self.teacher_fn(model, seen_by_teacher(batch), head)

        passes = Passes(partial(self.forward_fn, model, batch), through_base, through_teacher, self.figures)
        loss, self.measures = self.objective.loss(passes, batch, count)
        return loss


class Gradients(NamedTuple):
    """The result of going back through a segment: the gradients of the parameters and of the state before it (None for
    those that it does not reach), the loss, and the state after it."""

    parameters: Gradient
    before: Gradient
    loss: torch.Tensor
    after: State


class Segments(Step):
    """Compute a batch in segments of `length` positions, with the activations of one segment at a time in memory.

    The gradients are those of the whole row, up to rounding. A first pass keeps the state at each border. A second pass
    goes back from the last segment to the first, computes each again, and carries the gradient of its initial state to
    the segment before. With bptt above 0 that gradient stops at every bptt-th border. together: every rank goes through
    the same number of segments, as ZeRO-3's collective operations need.

    Under ZeRO-3 each module that is entered, forward and backward, may be a collective operation. So a segment that
    begins anew gets a State too, that of no sequence; and a State that nothing goes on from gets a gradient too, of
    zeros. Autograd then enters the same modules in the same order whatever a rank's segments hold.
    """

    objective: NextToken

    def __init__(self, length: int, bptt: int = 0, together: bool = False, objective: NextToken = NEXT_TOKEN) -> None:
        self.length, self.bptt, self.together, self.objective = length, bptt, together, objective

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        segments = self.segments(batch)
        seeds = torch.randint(2**62, (len(segments),)).tolist()  # so a segment draws the same in both passes
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
                head = self.head(chain[position], count)
                found = go_back(model, chain[position], befores[position], gradient, parameters, head)
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
            loss, after = run(model, segment, state, self.head(segment, 1))
            total, state = total + loss, following(segments, position + 1, kept(segment.state_after(after)), none)
        return total

    def sent(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        return {"segments": [segment.to(device) for segment in segments_of(batch, self.length)]}

    def segments(self, batch: Mapping[str, Any]) -> list[Segment]:
        """The batch's segments; with `together` also fillers, up to the largest number of segments on any rank."""
        segments: list[Segment] = batch.get("segments") or segments_of(batch, self.length)
        if self.together and dist.is_initialized():
            most = torch.tensor(len(segments), device=batch["tokens"].device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            segments += [filler(segments[0])] * (int(most) - len(segments))
        return segments

    def head(self, segment: Segment, count: float) -> HeadFunction:
        """A segment's part of the loss as a function that the model's head takes."""
        return self.objective.head(segment.targets, segment.counted, count, segment.weights)

    @torch.no_grad()
    def states(
        self, model: nn.Module, chain: Sequence[Segment], draws: Sequence[int], state: State, none: State
    ) -> list[State]:
        """Compute the State before each segment of a chain, from `state` on; `none` is that of no sequence."""
        befores = [state]
        for position, segment in enumerate(chain[:-1]):
            torch.manual_seed(draws[position])
            after = model(segment.tokens, befores[-1], segment.cu_seqlens, head=no_head)[1]
            befores.append(following(chain, position + 1, kept(segment.state_after(after)), none))
        return befores


def of_none(model: nn.Module) -> State:
    """The State of no sequence, from which a LanguageModel begins all sequences anew."""
    first = next(model.parameters())
    return State.zeros(cast(ModelConfig, model.config), 0, first.device, first.dtype)


def following(segments: Sequence[Segment], position: int, after: State, none: State) -> State:
    """The State before the segment at `position`: `after` if it goes on from the one before, else `none`."""
    return after if position < len(segments) and segments[position].carries else none


def kept(state: State) -> State:
    """Copy a State, detached, because its shifts are views of all inputs, and would keep them in memory."""
    return state.each(lambda name, tensor: tensor.detach().clone())


def run(model: nn.Module, segment: Segment, state: State | None, head: HeadFunction) -> tuple[torch.Tensor, State]:
    loss, after = model(segment.tokens, state, segment.cu_seqlens, head=head)
    return loss, after


def go_back(
    model: nn.Module, segment: Segment, before: State, gradient: Gradient, parameters: Tensors, head: HeadFunction
) -> Gradients:
    """Compute the Gradients of a segment from the State before it and the gradient of that after it (() for none)."""
    inputs = [tensor.detach().requires_grad_() for layer in before for tensor in layer]
    rest = iter(inputs)
    start = State(layer._make(islice(rest, len(layer))) for layer in before)
    loss, state = run(model, segment, start, head)
    after = segment.state_after(state)
    ends = [tensor for layer in after for tensor in layer]
    given = [torch.zeros_like(end) if grad is None else grad for end, grad in zip_longest(ends, gradient)]
    pairs = [(loss, None), *zip(ends, given)]
    outputs, grads = zip(*((output, grad) for output, grad in pairs if output.requires_grad))
    found = torch.autograd.grad(outputs, [*parameters, *inputs], grads, allow_unused=True)
    return Gradients(found[: len(parameters)], found[len(parameters) :], loss.detach(), kept(after))


def add(sums: list[torch.Tensor], gradients: Gradient, parameters: Tensors) -> None:
    """Add gradients to `sums`, which is [] at first. The sums are float32 at least, because many segments add up."""
    if not sums:
        shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in parameters]  # whole under ZeRO-3
        wide = torch.promote_types(torch.float32, parameters[0].dtype)
        sums += [torch.zeros(shape, dtype=wide, device=parameters[0].device) for shape in shapes]
    for total, gradient in zip(sums, gradients):
        if gradient is not None:
            total += gradient


def delivered(loss: torch.Tensor, gradients: Tensors, parameters: Tensors) -> torch.Tensor:
    """Return the loss; its backward hands known gradients to the parameters, once each, as ZeRO needs."""
    cut = [p for p in parameters if p.shape != getattr(p, "ds_shape", p.shape)]
    if cut:  # ZeRO-3's shards are gathered, because a gradient needs the whole shape; it shards again after backward
        cut[0].all_gather(param_list=cut)  # type: ignore[attr-defined]
    return Delivered.apply(loss, gradients, *parameters)


class Delivered(torch.autograd.Function):
    """Return the loss as it is; backward gives the parameters gradients that were computed before."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: Tensors, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients, ctx.dtypes = gradients, [parameter.dtype for parameter in parameters]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *((total * grad).to(dtype) for total, dtype in zip(ctx.gradients, ctx.dtypes))
