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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..config import DataConfig
from ..errors import UserError, told
from ..models.parts import HeadFunction, LanguageModel
from ..ops.recurrence.checks import vouch
from .steps import Batch, straight

WARM_UP = 2  # passes before recording: the first builds kernels, and libraries choose and allocate
LENGTHS = 4  # that rows of many lengths are padded to: a graph each
MULTIPLE = 64  # of tokens: what the recurrences' kernels take at a time


class Form(NamedTuple):
    """What a graph is of: rows of so many tokens; or, with `sequences`, one row of them that packs so many."""

    tokens: int
    sequences: int = 0


def recorded_forms(data: DataConfig, packs: tuple[int, int]) -> tuple[Form, ...]:
    """The Forms to record, the largest first, of which each other is a part. packs: as Samples has it of a micro batch.

    Rows that need not be full are of a few lengths. Packed sequences are as many as they are at most, or a power of 2.
    """
    fewest, most = packs
    rows = data.micro_bsz * data.documents if most else 1  # that lie in one
    full = data.dataload in ("get", "pack") and data.data_type != "pairs"
    steps = (LENGTHS,) if full else range(LENGTHS, 0, -1)
    rounded = [-(-rows * data.ctx_len * step // (LENGTHS * MULTIPLE)) * MULTIPLE for step in steps]
    lengths = dict.fromkeys(min(rows * data.ctx_len, length) for length in rounded)
    powers = [1 << i for i in range(most.bit_length()) if fewest <= 1 << i < most]
    return tuple(Form(length, number) for length in lengths for number in (most, *reversed(powers)))


class Graphed:
    """A Way whose blocks are recorded at the first batch, once for each Form, and replayed from then on.

    What is smaller is raised to the next Form: tokens behind a row's end, where nothing reaches them, and sequences
    without tokens."""

    def __init__(self, forms: Sequence[Form], gradients: bool = True) -> None:
        """forms: the largest first, so that the others' activations find room in its memory. gradients: whether it is
        for batches that have them, or for those that have none; others go straight."""
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
        result: torch.Tensor = model.head(model.ln_out(y), head)
        return result

    def record(self, model: LanguageModel, x: torch.Tensor, rows: int) -> None:
        """Record all Forms of so many rows, for inputs like x (B, T, C) but for its shape: what does not fit memory
        shows in the first step. A replay draws from torch's generators as blocks that run do; recording does not."""
        shapes = [torch.Size((rows, form.tokens, x.shape[2])) for form in self.forms]
        zeros = torch.zeros(shapes[0], dtype=x.dtype, device=x.device)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            for form, shape in zip(self.forms, shapes):
                part, leader = part_of(zeros, shape), self.graphs.get(self.forms[0])
                self.graphs[form] = BlockGraphs(model, part.requires_grad_(x.requires_grad), form.sequences, leader)


def part_of(memory: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The first elements of a contiguous tensor as one of a smaller shape."""
    return memory.view(-1)[: shape.numel()].view(shape)


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

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """x (B, T, C), cu_seqlens (n + 1,) or None -> (B, T, C)."""
        return self.model.through_blocks(x, cu_seqlens=cu_seqlens, keep=False)[0]


class BlockGraphs:
    """The blocks of a model as CUDA graphs, for inputs like x (B, T, C), on its GPU; where that packs sequences, for so
    many of them. Made without gradients, they have none.

    To be made when the engine has put the parameters where they stay. A call's backward must come before the next call
    of it, or of those that share its memory: the activations', and that of the parameters' gradients.
    """

    gy: torch.Tensor

    def __init__(
        self, model: LanguageModel, x: torch.Tensor, sequences: int = 0, leader: "BlockGraphs | None" = None
    ) -> None:
        """x: whose memory inputs are copied to; sequences: 0 where nothing is packed; leader: those of larger inputs,
        whose memory these take too."""
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
        with recording(self.forward_graph, self.pool):
            y, inputs = self.compute()
        self.y = y.detach()
        self.gradients: list[torch.Tensor] = []
        if inputs:
            self.gy = torch.zeros_like(y) if leader is None else part_of(leader.gy, y.shape)
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
        y = torch.func.functional_call(self.blocks, stand_ins, (x, self.bounds))
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

    def __call__(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C), in memory that the next call overwrites. cu_seqlens (n + 1,) where x packs n
        sequences, at most those recorded; the last goes on to the end of x."""
        y: torch.Tensor = Replayed.apply(self, x, cu_seqlens, *self.parameters.values())
        return y

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
        """The gradients of x, None where none is due, and of the parameters, in memory of their own."""
        self.gy.copy_(gy)
        self.backward_graph.replay()
        own = [torch.empty_like(gradient) for gradient in self.gradients]
        torch._foreach_copy_(own, self.gradients)  # many in one launch
        return [*own] if self.with_x else [None, *own]


def bounds_like(x: torch.Tensor, sequences: int) -> torch.Tensor:
    """cu_seqlens (sequences + 1,) of x (1, T, C), of about one length, which the kernels take unread."""
    T = x.shape[1]
    here = torch.arange(sequences + 1) * T // sequences
    bounds = here.to(x.device)
    vouch(bounds, here, T)
    return bounds


class Replayed(Function):
    """graphs, x, its cu_seqlens or None, the parameters that its gradients are of -> graphs' blocks of x."""

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
