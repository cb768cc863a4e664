"""Hand the states of a row from rank to rank, block by block, so that several ranks share the row's time.

Each rank of a group computes a part of the row. It receives the state before its part at a block, computes the block,
and sends the state after it to the rank of the next part. So ranks work on different blocks at once, nothing is
computed twice, and no kernel knows of it. Backward goes the other way with the states' gradients.
"""

from collections import deque
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist

from ...models.parts import LanguageModel
from ...models.state import State
from .segments import Segment

Tensors = Sequence[torch.Tensor]
MOST = 0.05  # of a pass that ranks wait for each other, if rows are long enough
LEAST = 512  # tokens of a part: products of fewer do not fill a GPU


class Line:
    """The ranks that share rows: `parts` ranks in a row, of which this one, `rank` of the run, is number `part`.

    Messages are sent from one device to the other, without the CPU's memory if these are GPUs. They leave while the
    rank computes; the oldest is waited for if as many are on their way as the model has blocks. Those that close the
    ring, from the last part of a segment to the first of the next, have a channel of their own, because NCCL keeps the
    order of all messages between two ranks, whichever way they go.

    anchor: a number that all states that come in depend on, so that whoever asks for its gradient has the line served.
    """

    def __init__(self, rank: int, parts: int, blocks: int) -> None:
        self.rank, self.parts, self.part, self.blocks = rank, parts, rank % parts, blocks
        self.pending: deque[tuple[Any, torch.Tensor]] = deque()  # a message must live until it has left
        self.ring: Any = None
        self.anchor = torch.zeros((), requires_grad=True)

    def open_ring(self) -> None:
        """Make the channel that closes the ring. All ranks of the run call it, if any does."""
        if self.ring is None and dist.is_initialized():
            self.ring = dist.new_group()

    def next_to(self, step: int) -> tuple[int, Any]:
        """The rank of the part before (step -1) or after (1) this one, and its channel."""
        other = self.part + step
        if 0 <= other < self.parts:
            return self.rank + step, None
        return self.rank + step - step * self.parts, self.ring

    def send(self, tensors: Tensors, step: int) -> None:
        """Send tensors to the part before or after, as one message that keeps every bit."""
        wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        message = torch.cat([tensor.detach().flatten().to(wide) for tensor in tensors])
        rank, group = self.next_to(step)
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


class Relay:
    """A pass through a model's blocks over this rank's part of a batch (models/parts.py).

    With `keep`, a pass without gradients is followed by one that computes the same again, from the states that the
    first received, and sends none; it only goes back along the line."""

    def __init__(self, line: Line, model: LanguageModel, segment: Segment, keep: bool = False) -> None:
        config, weight = model.config, model.emb.weight
        rows = len(segment.tokens)  # or the one sequence that crosses a border, if the batch is packed
        self.line, self.model, self.device = line, model, weight.device
        self.carries, self.goes_on, self.packed = segment.carries, segment.goes_on, segment.cu_seqlens is not None
        self.like = State.zeros(config, rows, "meta", weight.dtype)[0]
        self.kept: list[Tensors] | None = [] if keep else None
        self.again = False

    def before(self, layer: int) -> Any:
        if not self.carries:
            return None
        anchor = self.line.anchor if self.trains_until(layer) else None
        return self.like._make(Receive.apply(self, layer, anchor))

    def after(self, layer: int, x: torch.Tensor, state: Any) -> torch.Tensor:
        if not self.goes_on:
            return x
        last = [tensor[-1:] if self.packed else tensor for tensor in state]
        return Send.apply(self, x, *last)

    def trains_until(self, layer: int) -> bool:
        """Tell whether the states at a block have gradients; ranks agree on it, because their models are alike."""
        modules = (self.model.emb, *self.model.blocks[: layer + 1])
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def received(self, layer: int) -> Tensors:
        """The tensors of the state before the part at a block."""
        if self.again:
            assert self.kept is not None  # because only such a pass is repeated
            return self.kept[layer]
        found = self.line.receive(self.like, self.device, -1)
        if self.kept is not None:
            self.kept.append(found)
        return found


class Receive(torch.autograd.Function):
    """The state before a part at a block; backward sends its gradient to the part before."""

    @staticmethod
    def forward(ctx: Any, relay: Relay, layer: int, anchor: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.relay = relay
        return tuple(tensor.clone() if relay.again else tensor for tensor in relay.received(layer))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.relay.line.send(gradients, -1)
        return None, None, torch.zeros_like(ctx.relay.line.anchor)


class Send(torch.autograd.Function):
    """x as it is, once the state after a part at a block is sent; backward receives the gradient of that state."""

    @staticmethod
    def forward(ctx: Any, relay: Relay, x: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        ctx.relay, ctx.like = relay, [torch.empty_like(tensor, device="meta") for tensor in state]
        if not relay.again:
            relay.line.send(state, 1)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, gradient, *ctx.relay.line.receive(ctx.like, ctx.relay.device, 1)


def waiting(parts: int, blocks: int, segments: int = 1) -> float:
    """The share of a pass that a rank of a line waits, if blocks take the same time: the first works while the last
    waits for `parts` - 1 blocks, and the other way round. If there are more parts than blocks, the first waits before
    each segment too, for the states of the one before."""
    passed = (segments - 1) * max(parts, blocks) + blocks + parts - 1
    return 1 - segments * blocks / passed


def in_flight(parts: int, blocks: int, tokens: int, least: int = LEAST) -> int:
    """The number of segments in which a row of so many tokens goes along a line, one behind the other: as few as let
    ranks wait for MOST of a pass, beyond what they wait with any number, if parts have `least` tokens."""
    most = max(1, tokens // (parts * least))
    goal = MOST + max(0.0, 1 - blocks / parts)
    return next((number for number in range(1, most) if waiting(parts, blocks, number) <= goal), most)
