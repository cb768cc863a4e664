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

from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..models.parts import LanguageModel
from .steps import Batch, Whole, loss_of

WARM_UP = 2  # passes before recording: the first builds kernels, and libraries choose and allocate


class Graphed(Whole):
    """Whole, with blocks that are recorded at the first batch that has gradients, and replayed at each other of its
    shape; batches of another shape, and those without gradients, go through the blocks themselves."""

    def __init__(self) -> None:
        self.graphs: BlockGraphs | None = None

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        assert isinstance(model, LanguageModel)
        tokens = batch["tokens"]
        fits = self.graphs is None or tokens.shape == self.graphs.x.shape[:2]
        if not torch.is_grad_enabled() or not fits:
            return super().loss(model, batch, count)
        x = model.emb(tokens)
        if self.graphs is None:
            self.graphs = BlockGraphs(model, x)
        loss: torch.Tensor = model.head(model.ln_out(self.graphs(x)), loss_of(batch, count))
        return loss


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

    To be made when the engine has put the parameters where they stay. A call's backward must come before the next call.
    """

    def __init__(self, model: LanguageModel, x: torch.Tensor) -> None:
        self.blocks, self.x, self.calls = Blocks(model), x.detach().clone(), 0
        self.parameters = {
            name: parameter
            for name, parameter in self.blocks.named_parameters()
            if name.startswith("model.blocks.") and parameter.requires_grad
        }
        self.with_x = x.requires_grad
        self.warm_up()
        self.addresses = self.current_addresses()
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self.forward_graph, pool=pool, capture_error_mode="thread_local"):
            y, inputs = self.compute()
        self.y, self.gy = y.detach(), torch.zeros_like(y)
        self.gradients: tuple[torch.Tensor, ...] = ()
        if inputs:
            with torch.cuda.graph(self.backward_graph, pool=pool, capture_error_mode="thread_local"):
                self.gradients = torch.autograd.grad(y, inputs, self.gy)

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
        self.calls += 1
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
        ctx.graphs, ctx.call = graphs, graphs.calls
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.call == ctx.graphs.calls, "what backward needs of this call was overwritten by a later one"
        return None, *ctx.graphs.replay_backward(gy)
