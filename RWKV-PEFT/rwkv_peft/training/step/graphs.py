"""--cuda_graphs: record the kernel launches of all blocks, forward and backward, once, and replay them as a whole.

A kernel of a small micro batch ends before Python has launched the next one; a graph of all launches takes one. It
reads and writes memory at the addresses that it was recorded with: inputs are copied there, parameters have to stay
where they are, and the next replay overwrites its results. No GPU has run this yet: tests/training/test_graphs.py
records and replays torch's operations on a CPU instead.

torch.cuda.make_graphed_callables does much the same, but does not fit, for three reasons. It returns its own memory as
parameter gradients, which micro batches add up in place while the next replay overwrites it. While it records, nothing
may be pinned, and a thread pins the batches to come. It differentiates with respect to the parameters themselves, whose
hooks the engine has tied to the default stream.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...config import DataConfig
from ...models.parts import HeadFunction, LanguageModel
from ...ops.recurrence.checks import vouch
from ...recording import WARM_UP, aside, recording
from .steps import Batch, straight

REMEDY = "leave --cuda_graphs out"
LENGTHS = 4  # lengths that shorter rows are padded to, with a graph each
MULTIPLE = 64  # of these lengths: the tokens that the recurrences' kernels take at a time


class Form(NamedTuple):
    """The shape that a graph is recorded for: rows of so many tokens; with `sequences`, one row that packs so many."""

    tokens: int
    sequences: int = 0


def recorded_forms(data: DataConfig, packs: tuple[int, int]) -> tuple[Form, ...]:
    """List the Forms to record, first the largest, which contains all others. packs: Samples.packs of a micro batch.

    Rows that may be short get LENGTHS lengths. The numbers of packed sequences are the most and the powers of 2 below
    it, from the fewest on.
    """
    fewest, most = packs
    rows = data.micro_bsz * data.documents if most else 1  # that are packed into one
    full = data.dataload in ("get", "pack") and data.documents == 1
    steps = (LENGTHS,) if full else range(LENGTHS, 0, -1)
    rounded = [-(-rows * data.ctx_len * step // (LENGTHS * MULTIPLE)) * MULTIPLE for step in steps]
    lengths = dict.fromkeys(min(rows * data.ctx_len, length) for length in rounded)
    powers = [1 << i for i in range(most.bit_length()) if fewest <= 1 << i < most]
    return tuple(Form(length, number) for length in lengths for number in (most, *reversed(powers)))


class Graphed:
    """A Way that records the blocks at the first batch, once for each Form, and replays them from then on.

    A smaller batch is padded to the next Form: by tokens after a row's end, which nothing before them sees, and by
    sequences without tokens.
    """

    def __init__(self, forms: Sequence[Form], gradients: bool = True) -> None:
        """forms: the largest first, because the others use the memory of its activations. gradients: replay passes with
        gradients (True) or without (False); the others run the model's own forward."""
        self.forms, self.gradients = forms, gradients
        self.graphs: dict[Form, BlockGraphs] = {}

    def __call__(self, model: nn.Module, batch: Batch, head: HeadFunction) -> torch.Tensor:
        assert isinstance(model, LanguageModel)
        if torch.is_grad_enabled() != self.gradients:
            return straight(model, batch, head)
        tokens, bounds = batch["tokens"], batch.get("cu_seqlens")
        (rows, size), sequences = tokens.shape, 0 if bounds is None else len(bounds) - 1
        form = min(form for form in self.forms if form.tokens >= size and form.sequences >= sequences)
        x = model.emb(F.pad(tokens, (0, form.tokens - size)))
        if not self.graphs:
            self.record(model, x, rows)
        y = self.graphs[form](x, bounds)[:, :size]
        return model.head(model.ln_out(y), head)

    def record(self, model: LanguageModel, x: torch.Tensor, rows: int) -> None:
        """Record all Forms of so many rows, for inputs with the channels, dtype and device of x (B, T, C); all at once,
        so that a lack of memory shows in the first step. Recording leaves torch's generators as they were, and a replay
        draws from them as the blocks do."""
        shapes = [torch.Size((rows, form.tokens, x.shape[2])) for form in self.forms]
        zeros = torch.zeros(shapes[0], dtype=x.dtype, device=x.device)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            for form, shape in zip(self.forms, shapes):
                part, leader = part_of(zeros, shape), self.graphs.get(self.forms[0])
                self.graphs[form] = BlockGraphs(model, part.requires_grad_(x.requires_grad), form.sequences, leader)


def part_of(memory: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """View the first elements of a contiguous tensor in a smaller shape."""
    return memory.view(-1)[: shape.numel()].view(shape)


class Blocks(nn.Module):
    """A model's blocks as a module, for torch.func.functional_call."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """x (B, T, C), cu_seqlens (n + 1,) or None -> (B, T, C)."""
        return self.model.through_blocks(x, cu_seqlens=cu_seqlens, keep=False)[0]


class BlockGraphs:
    """The blocks of a model as CUDA graphs, for inputs of x's shape (B, T, C), dtype and GPU; if x packs sequences, for
    so many of them. Graphs that are made without gradients have no backward.

    They must be made once the engine has put the parameters where they stay. The backward of a call must come before
    the next call of these graphs, or of graphs that share their memory for activations and parameter gradients.
    """

    gy: torch.Tensor

    def __init__(
        self, model: LanguageModel, x: torch.Tensor, sequences: int = 0, leader: "BlockGraphs | None" = None
    ) -> None:
        """Inputs are copied to x's memory; sequences: 0 if none are packed; leader: graphs whose memory these use."""
        self.blocks, self.x, self.calls = Blocks(model), x.detach(), 0
        self.bounds = bounds_like(x, sequences) if sequences else None
        self.leader = leader or self
        self.parameters = {
            name: parameter
            for name, parameter in self.blocks.named_parameters()
            if name.startswith("model.blocks.") and parameter.requires_grad and torch.is_grad_enabled()
        }
        self.with_x = x.requires_grad
        self.warm_up()
        self.addresses = self.current_addresses()
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.pool: Any = torch.cuda.graph_pool_handle() if leader is None else leader.pool
        with recording(self.forward_graph, self.pool, REMEDY):
            y, inputs = self.compute()
        self.y = y.detach()
        self.gradients: list[torch.Tensor] = []
        if inputs:
            self.gy = torch.zeros_like(y) if leader is None else part_of(leader.gy, y.shape)
            with recording(self.backward_graph, self.pool, REMEDY):
                self.gradients = [*torch.autograd.grad(y, inputs, self.gy)]
                if leader is not None and self.parameters:
                    own, shared = (graphs.gradients[-len(self.parameters) :] for graphs in (self, leader))
                    torch._foreach_copy_(shared, own)
                    self.gradients[-len(self.parameters) :] = shared

    def compute(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the blocks -> y (B, T, C), and the tensors to differentiate with respect to: x if it needs a gradient,
        and stand-ins for the parameters, in their memory."""
        x = self.x.detach().requires_grad_(self.with_x)
        stand_ins = {name: parameter.detach().requires_grad_() for name, parameter in self.parameters.items()}
        y = torch.func.functional_call(self.blocks, stand_ins, (x, self.bounds))
        return y, [*([x] if self.with_x else ()), *stand_ins.values()]

    def warm_up(self) -> None:
        """Compute on a side stream, as recording does, and drop the parameters that no gradient reaches."""
        with aside():
            for _ in range(WARM_UP):
                y, inputs = self.compute()
                if inputs:
                    found = torch.autograd.grad(y, inputs, torch.zeros_like(y), allow_unused=True)
                    reached = found[len(found) - len(self.parameters) :]
                    pairs = zip(self.parameters.items(), reached)
                    self.parameters = {name: one for (name, one), gradient in pairs if gradient is not None}

    def current_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters.values()]

    def __call__(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C), in memory that the next call overwrites. cu_seqlens (n + 1,) if x packs n
        sequences, at most as many as recorded; the last is extended to the end of x."""
        return Replayed.apply(self, x, cu_seqlens, *self.parameters.values())

    def replay_forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        assert self.current_addresses() == self.addresses, "parameters have moved since the blocks were recorded"
        self.leader.calls += 1
        self.x.copy_(x)
        if self.bounds is not None and cu_seqlens is not None:
            begins = cu_seqlens[:-1]
            self.bounds[: len(begins)].copy_(begins)
            self.bounds[len(begins) :].fill_(x.shape[1])
        self.forward_graph.replay()
        return self.y.detach()

    def replay_backward(self, gy: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients of x (None if it needs none) and of the parameters, in memory of their own."""
        self.gy.copy_(gy)
        self.backward_graph.replay()
        own = [torch.empty_like(gradient) for gradient in self.gradients]
        torch._foreach_copy_(own, self.gradients)  # many in one launch
        return [*own] if self.with_x else [None, *own]


def bounds_like(x: torch.Tensor, sequences: int) -> torch.Tensor:
    """Make cu_seqlens (sequences + 1,) of x (1, T, C), of about one length; kernels need not read it to check it."""
    T = x.shape[1]
    here = torch.arange(sequences + 1) * T // sequences
    bounds = here.to(x.device)
    vouch(bounds, here, T)
    return bounds


class Replayed(Function):
    """Replay graphs for x, with its cu_seqlens or None and the parameters that get gradients -> the blocks' output."""

    @staticmethod
    def forward(
        ctx: Any, graphs: BlockGraphs, x: torch.Tensor, cu_seqlens: torch.Tensor | None, *parameters: torch.Tensor
    ) -> torch.Tensor:
        y = graphs.replay_forward(x, cu_seqlens)
        ctx.graphs, ctx.call = graphs, graphs.leader.calls
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.call == ctx.graphs.leader.calls, "what backward needs of this call was overwritten by a later one"
        gx, *gradients = ctx.graphs.replay_backward(gy)
        return None, gx, None, *gradients
