"""--cuda_graphs: what a GPU is told to do of all blocks, forward and backward, recorded once and replayed as a whole.

A small micro batch is over before Python has launched the next kernel; a graph of all launches takes one. It reads and
writes memory at the addresses that it was recorded with: inputs are copied there, parameters have to stay where they
are, and what it leaves is overwritten by the next replay. No GPU has run this yet: tests/training/test_graphs.py
records and replays torch's operations on a CPU instead.

torch.cuda.make_graphed_callables does the like, and three things that cannot be here. It hands out its own memory as
the gradients of parameters, which micro batches add up in place, while the next replay overwrites it. While it records,
nothing may be pinned, and a thread pins the batches to come. And it differentiates in the parameters themselves, whose
hooks the engine has tied to the default stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..errors import UserError, told
from ..models.parts import LanguageModel
from .steps import Batch, Whole, loss_of

WARM_UP = 2  # passes before recording: the first builds kernels, and libraries choose and allocate
LENGTHS = 4  # that rows of many lengths are padded to: a graph each
MULTIPLE = 64  # of tokens: what the recurrences' kernels take at a time


def recorded_lengths(ctx_len: int, padded: bool) -> tuple[int, ...]:
    """The lengths of rows to record, the longest first: ctx_len, and parts of it where rows are `padded`."""
    steps = range(LENGTHS, 0, -1) if padded else (LENGTHS,)
    rounded = [-(-ctx_len * step // (LENGTHS * MULTIPLE)) * MULTIPLE for step in steps]
    return tuple(dict.fromkeys(min(ctx_len, length) for length in rounded))


class Graphed(Whole):
    """Whole, with blocks that are recorded at the first batch that has gradients, once for each length of rows, and
    replayed from then on: shorter rows are padded to the next of the lengths, behind their end, where nothing reaches
    them. Batches without gradients go through the blocks themselves."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """lengths: the longest first, so that the others' activations find room in its memory."""
        self.lengths = lengths
        self.graphs: dict[int, BlockGraphs] = {}

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        assert isinstance(model, LanguageModel)
        if not torch.is_grad_enabled():
            return super().loss(model, batch, count)
        tokens = batch["tokens"]
        rows, size = tokens.shape
        length = min(length for length in self.lengths if length >= size)
        x = model.emb(F.pad(tokens, (0, length - size)))
        if not self.graphs:
            self.record(model, x, rows)
        y = self.graphs[length](x)[:, :size]
        loss: torch.Tensor = model.head(model.ln_out(y), loss_of(batch, count))
        return loss

    def record(self, model: LanguageModel, x: torch.Tensor, rows: int) -> None:
        """Record all lengths of so many rows, for inputs like x (B, T, C) but for its shape: what does not fit memory
        shows in the first step."""
        for length in self.lengths:
            zeros = torch.zeros(rows, length, x.shape[2], dtype=x.dtype, device=x.device)
            leader = self.graphs.get(self.lengths[0])
            self.graphs[length] = BlockGraphs(model, zeros.requires_grad_(x.requires_grad), leader)


@contextmanager
def recording(graph: Any, pool: Any) -> Iterator[None]:
    """What is launched meanwhile goes into a torch.cuda.CUDAGraph, with memory of a pool. Raises UserError where it
    cannot."""
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"--cuda_graphs 1: this GPU's driver cannot record what the blocks do ({told(error)}); leave it out"
        ) from error


class Blocks(nn.Module):
    """A model's blocks as a module, for torch.func.functional_call."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.model.through_blocks(x)[0]


class BlockGraphs:
    """The blocks of a model as CUDA graphs, for inputs like x (B, T, C), on its GPU.

    To be made when the engine has put the parameters where they stay. A call's backward must come before the next call
    of it, or of those that share its memory: the activations', and that of the parameters' gradients.
    """

    def __init__(self, model: LanguageModel, x: torch.Tensor, leader: "BlockGraphs | None" = None) -> None:
        """leader: those of larger inputs, whose memory these take too."""
        self.blocks, self.x, self.calls = Blocks(model), x.detach(), 0
        self.leader = leader or self
        self.parameters = {
            name: parameter
            for name, parameter in self.blocks.named_parameters()
            if name.startswith("model.blocks.") and parameter.requires_grad
        }
        self.with_x = x.requires_grad
        self.warm_up()
        self.addresses = self.current_addresses()
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.pool: Any = torch.cuda.graph_pool_handle() if leader is None else leader.pool
        with recording(self.forward_graph, self.pool):
            y, inputs = self.compute()
        self.y, self.gy = y.detach(), torch.zeros_like(y)
        self.gradients: list[torch.Tensor] = []
        if inputs:
            with recording(self.backward_graph, self.pool):
                self.gradients = [*torch.autograd.grad(y, inputs, self.gy)]
                if leader is not None and self.parameters:
                    own, shared = (graphs.gradients[-len(self.parameters) :] for graphs in (self, leader))
                    torch._foreach_copy_(shared, own)
                    self.gradients[-len(self.parameters) :] = shared

    def compute(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """y (B, T, C), and the tensors to differentiate it in: x where that is due, and stand-ins for the parameters,
        in their memory."""
        x = self.x.detach().requires_grad_(self.with_x)
        stand_ins = {name: parameter.detach().requires_grad_() for name, parameter in self.parameters.items()}
        y = torch.func.functional_call(self.blocks, stand_ins, (x,))
        return y, [*([x] if self.with_x else ()), *stand_ins.values()]

    def warm_up(self) -> None:
        """Compute on a stream besides the current one, as recording does, and forget the parameters that no gradient
        reaches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                y, inputs = self.compute()
                if inputs:
                    found = torch.autograd.grad(y, inputs, torch.zeros_like(y), allow_unused=True)
                    reached = found[len(found) - len(self.parameters) :]
                    pairs = zip(self.parameters.items(), reached)
                    self.parameters = {name: one for (name, one), gradient in pairs if gradient is not None}
        torch.cuda.current_stream().wait_stream(stream)

    def current_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters.values()]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C), in memory that the next call overwrites."""
        y: torch.Tensor = Replayed.apply(self, x, *self.parameters.values())
        return y

    def replay_forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.current_addresses() == self.addresses, "parameters have moved since the blocks were recorded"
        self.leader.calls += 1
        self.x.copy_(x)
        self.forward_graph.replay()
        return self.y.detach()

    def replay_backward(self, gy: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients of x, None where none is due, and of the parameters, in memory of their own."""
        self.gy.copy_(gy)
        self.backward_graph.replay()
        own = [torch.empty_like(gradient) for gradient in self.gradients]
        torch._foreach_copy_(own, self.gradients)  # many in one launch
        return [*own] if self.with_x else [None, *own]


class Replayed(Function):
    """graphs, x, the parameters that its gradients are of -> graphs' blocks of x."""

    @staticmethod
    def forward(ctx: Any, graphs: BlockGraphs, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        y = graphs.replay_forward(x)
        ctx.graphs, ctx.call = graphs, graphs.leader.calls
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.call == ctx.graphs.leader.calls, "what backward needs of this call was overwritten by a later one"
        return None, *ctx.graphs.replay_backward(gy)
