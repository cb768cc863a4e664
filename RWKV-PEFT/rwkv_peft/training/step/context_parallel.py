"""Several ranks share the time of a row (--context_parallel): each computes a part and sends its states to the next.

A rank receives the state before its part at a block, computes the block, and sends the state after it to the rank of
the next part. So ranks work on different blocks at once. Nothing is computed twice; kernels are as without it. Backward
goes the other way with the states' gradients.
"""

from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from functools import reduce
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ...config import Objective
from ...models.parts import HeadFunction, LanguageModel
from ...models.state import State
from .segments import Segment, end_of, part_of
from .shared_prefix import no_head
from .steps import Batch, Tensors, Whole, add_gradients, trainable, with_gradients

MOST = 0.05  # of a pass that ranks wait for each other, if rows are long enough
LEAST = 512  # tokens of a part: products of fewer do not fill a GPU
GRAIN = 32  # positions whose multiples kernels compute as they compute the whole row


class Line:
    """The ranks that share rows: `parts` consecutive ranks; this one, `rank` of the run, is number `part`.

    Messages go from device to device. They are sent while the rank computes; the oldest is waited for if as many are
    under way as the model has blocks. Those that close the ring, from the last part of a segment to the first of the
    next, have a channel of their own: NCCL keeps the order of all messages between two ranks, whichever way they go.

    anchor: a number on which all received states depend. Going back to it serves the line. limit: the time that a
    message of the ring may take.
    """

    def __init__(self, rank: int, parts: int, blocks: int, limit: timedelta | None = None) -> None:
        self.rank, self.parts, self.part, self.blocks, self.limit = rank, parts, rank % parts, blocks, limit
        self.pending: deque[tuple[Any, torch.Tensor]] = deque()  # a message must live until it is sent
        self.ring: Any = None
        self.anchor = torch.zeros((), requires_grad=True)

    def open_ring(self) -> None:
        """Make the channel that closes the ring. All ranks of the run call it, if any does."""
        if self.ring is None and dist.is_initialized():
            # Every rank makes the group, also those outside of the line: torch requires it of new_group.
            self.ring = dist.new_group(timeout=self.limit)

    def next_to(self, step: int) -> tuple[int, Any]:
        """(the rank of the part before (step -1) or after (1) this one, its channel)."""
        other = self.part + step
        if 0 <= other < self.parts:
            return self.rank + step, None
        return self.rank + step - step * self.parts, self.ring

    def send(self, tensors: Tensors, step: int) -> None:
        """Send tensors to the part before or after, as one message that keeps every bit."""
        wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        # One message, because each has a latency of its own; the widest dtype holds all others exactly.
        message = torch.cat([tensor.detach().flatten().to(wide) for tensor in tensors])
        rank, group = self.next_to(step)
        # Waiting for the oldest bounds the memory of messages to one pass's.
        if len(self.pending) == self.blocks:
            self.pending.popleft()[0].wait()
        self.pending.append((dist.isend(message, rank, group), message))

    def receive(self, like: Tensors, device: torch.device, step: int) -> tuple[torch.Tensor, ...]:
        """Receive tensors of the shapes and dtypes of `like` on a device, from the part before or after."""
        wide = reduce(torch.promote_types, (tensor.dtype for tensor in like))
        message = torch.empty(sum(tensor.numel() for tensor in like), dtype=wide, device=device)
        rank, group = self.next_to(step)
        dist.recv(message, rank, group)
        parts = message.split([tensor.numel() for tensor in like])
        return tuple(part.view(one.shape).to(one.dtype) for part, one in zip(parts, like))


class StateRelay:
    """A pass through a model's blocks over this rank's part of a batch (Relay of models/parts.py).

    With `repeats`, a pass without gradients is followed by one that computes the same again from the states that the
    first received. It sends none; it only goes back along the line.
    """

    def __init__(self, line: Line, model: LanguageModel, segment: Segment, repeats: bool = False) -> None:
        config, weight = model.config, model.emb.weight
        rows = len(segment.tokens)  # or the one sequence that crosses a border, if the batch is packed
        self.line, self.model, self.device = line, model, weight.device
        self.carries, self.goes_on, self.packed = segment.carries, segment.goes_on, segment.cu_seqlens is not None
        self.like = State.zeros(config, rows, "meta", weight.dtype)[0]  # of one layer; all have the same shapes
        self.states: list[Tensors] | None = [] if repeats else None
        self.again = False

    def before(self, layer: int) -> Any:
        if not self.carries:
            return None
        anchor = self.line.anchor if self.trains_until(layer) else None
        return self.like._make(ReceiveState.apply(self, layer, anchor))

    def after(self, layer: int, x: torch.Tensor, state: Any) -> torch.Tensor:
        if not self.goes_on:
            return x
        last = [tensor[-1:] if self.packed else tensor for tensor in state]
        return SendState.apply(self, x, *last)

    def trains_until(self, layer: int) -> bool:
        """True if the states at a block have gradients. Ranks agree on it: they have the same model."""
        modules = (self.model.emb, *self.model.blocks[: layer + 1])
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def received(self, layer: int) -> Tensors:
        """The tensors of the state before the part at a block."""
        if self.again:
            assert self.states is not None  # because only such a pass is repeated
            return self.states[layer]
        tensors = self.line.receive(self.like, self.device, -1)
        if self.states is not None:
            self.states.append(tensors)
        return tensors


class ReceiveState(torch.autograd.Function):
    """The state before a part at a block; backward sends its gradient to the part before."""

    @staticmethod
    def forward(ctx: Any, relay: StateRelay, layer: int, anchor: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.relay = relay
        # Clones, because autograd writes its history into the tensors that a Function returns.
        return tuple(tensor.clone() if relay.again else tensor for tensor in relay.received(layer))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.relay.line.send(gradients, -1)
        return None, None, torch.zeros_like(ctx.relay.line.anchor)


class SendState(torch.autograd.Function):
    """x as it is, once the state after a part at a block is sent; backward receives the gradient of that state."""

    @staticmethod
    def forward(ctx: Any, relay: StateRelay, x: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        ctx.relay, ctx.like = relay, [torch.empty_like(tensor, device="meta") for tensor in state]
        if not relay.again:
            relay.line.send(state, 1)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, gradient, *ctx.relay.line.receive(ctx.like, ctx.relay.device, 1)


class SharedRows(Whole):
    """This rank's part of all positions of a batch, in segments that follow each other along the line.

    Without `chunk` the number of segments is in_flight's. All go forward, then all go back: ranks wait only at both
    ends. No pass is repeated. With segments of `chunk` positions (--chunk_ctx) the activations of one at a time are in
    memory: each but the last is computed once more before it goes back.
    """

    def __init__(
        self, objective: Objective, line: Line, teacher: nn.Module | None = None, chunk: int = 0, least: int = LEAST
    ) -> None:
        super().__init__(objective, self.relayed_forward, teacher=teacher)
        self.line, self.teacher_fn, self.chunk, self.least = line, self.relayed_forward, chunk, least

    def prepare_inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """A batch on the CPU -> (this rank's segments on the device, their tokens, mask and weights as one batch)."""
        whole = padded(batch, self.line.parts)
        length = self.segment_length(whole["mask"].shape[1])
        segments = [segment.to(device) for segment in own_parts(whole, length, self.line)]
        inputs = {"segments": segments, "tokens": torch.cat([segment.tokens for segment in segments], 1)}
        inputs["mask"] = torch.cat([counts(segment) for segment in segments])
        weights = [segment.weights.flatten()[segment.counted] for segment in segments if segment.weights is not None]
        return {**batch, **inputs} | ({"weights": torch.cat(weights)} if weights else {})

    def segment_length(self, T: int) -> int:
        """The length of segments of rows of T positions, a multiple of the line's parts."""
        parts = self.line.parts
        if self.chunk:
            return max(1, self.chunk // parts) * parts
        number = in_flight(parts, self.line.blocks, T, self.least)
        return T if number == 1 else -(-T // (number * parts * GRAIN)) * parts * GRAIN

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        """See Step.loss. Its backward pass is over when it returns. Engines exchange gradients between ranks as they
        come, but ranks that share rows reach a block at different times."""
        self.line.open_ring()
        parameters = trainable(model)
        if self.chunk:
            return self.recomputed(model, batch, count, parameters)
        loss = self.sum_of_parts(model, batch, count)
        computed = self.gradients(loss, parameters)
        gradients = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(parameters, computed)]
        return with_gradients(loss.detach(), gradients, parameters)

    def recomputed(self, model: nn.Module, batch: Batch, count: float, parameters: Tensors) -> torch.Tensor:
        """The loss, with the activations of one segment at a time in memory."""
        parts = list(self.parts(batch))
        seeds = torch.randint(2**62, (len(parts),)).tolist()  # so a segment's dropout is the same in both passes
        for part in parts:
            repeats = part is not parts[-1]
            part["relay"] = StateRelay(self.line, cast(LanguageModel, model), part["segment"], repeats)
        for part, seed in zip(parts[:-1], seeds):
            torch.manual_seed(seed)
            with torch.no_grad():
                self.relayed_forward(model, part, no_head)
            # From here on the relay repeats: it takes the cached states, and sends none.
            part["relay"].again = True
        sums: list[torch.Tensor] = []
        total = torch.zeros((), device=batch["tokens"].device)
        for part, seed in reversed([*zip(parts, seeds)]):
            torch.manual_seed(seed)
            loss = super().loss(model, part, count)
            add_gradients(sums, self.gradients(loss, parameters), parameters)
            total += loss.detach()
            part.clear()  # frees the states that it received
        return with_gradients(total, sums, parameters)

    def gradients(self, loss: torch.Tensor, parameters: Tensors) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the parameters; states' gradients go along the line meanwhile."""
        return torch.autograd.grad(loss, [*parameters, self.line.anchor], allow_unused=True)[:-1]

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self.line.open_ring()
        return self.sum_of_parts(model, batch, 1)

    def sum_of_parts(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        """The sum of the segments' losses, without data files' shares; backward begins at the last on every rank."""
        total, measures = torch.zeros((), device=batch["tokens"].device), dict[str, torch.Tensor]()
        for part in self.parts(batch):
            total = total + super().loss(model, part, count)
            measures = {name: measures.get(name, 0) + measure for name, measure in self.measures.items()}
        self.measures = measures
        return total

    def parts(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """Yield each segment of this rank as a batch for the objective."""
        for segment in batch["segments"]:
            fields = {name: value for name, value in segment._asdict().items() if value is not None}
            yield fields | {"segment": segment, "mask": counts(segment)}

    def relayed_forward(self, model: nn.Module, part: Batch, head: HeadFunction) -> torch.Tensor:
        """Head's result after a model's forward over this rank's part of a batch."""
        segment = part["segment"]
        relay = part.get("relay") or StateRelay(self.line, cast(LanguageModel, model), segment)
        return model(segment.tokens, None, segment.cu_seqlens, head, keep=False, relay=relay)[0]


def counts(segment: Segment) -> torch.Tensor:
    """True for each target of a segment that counts: (n,)."""
    return torch.ones_like(segment.counted, dtype=torch.bool)


def padded(batch: Batch, multiple: int) -> Batch:
    """Lengthen the rows of a batch to a multiple, by tokens that do not count behind their last."""
    missing = -batch["mask"].shape[1] % multiple
    if not missing:
        return batch
    names = [name for name in ("tokens", "targets", "mask", "weights") if name in batch]
    lengthened = {name: F.pad(batch[name], (0, missing)) for name in names}
    if "cu_seqlens" in batch:
        lengthened["cu_seqlens"] = torch.cat([batch["cu_seqlens"][:-1], batch["cu_seqlens"][-1:] + missing])
    return lengthened


def own_parts(batch: Batch, length: int, line: Line) -> list[Segment]:
    """This rank's part of each segment of `length` positions; both are multiples of the line's parts."""
    T, parts = batch["mask"].shape[1], []
    for start in range(0, end_of(batch), length):
        size = (min(start + length, T) - start) // line.parts
        first = start + line.part * size
        parts.append(part_of(batch, first, first + size))
    if line.part == line.parts - 1:  # nothing follows the last segment, though the row may go on
        parts[-1] = parts[-1]._replace(goes_on=False)
    return parts


def waiting(parts: int, blocks: int, segments: int = 1) -> float:
    """The share of a pass that a rank of a line waits, if blocks take the same time.

    The first works while the last waits for `parts` - 1 blocks; at the end the last works and the first waits. If there
    are more parts than blocks, the first waits before each segment too, for the states of the one before.
    """
    passed = (segments - 1) * max(parts, blocks) + blocks + parts - 1
    return 1 - segments * blocks / passed


def in_flight(parts: int, blocks: int, tokens: int, least: int = LEAST) -> int:
    """The number of segments in which a row of so many tokens goes along a line, one behind the other.

    As few as let ranks wait for MOST of a pass, beyond the wait with any number, if parts have `least` tokens.
    """
    most = max(1, tokens // (parts * least))
    goal = MOST + max(0.0, 1 - blocks / parts)
    return next((number for number in range(1, most) if waiting(parts, blocks, number) <= goal), most)
