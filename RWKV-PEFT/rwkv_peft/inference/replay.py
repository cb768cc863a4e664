"""Read one token of each row by CUDA graphs: one launch in place of some hundreds, whatever Python does meanwhile.

No GPU has run this yet: tests/inference/test_replay.py records and replays torch's operations on a CPU instead.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from ..cli.errors import told
from ..models.parts import LanguageModel
from ..models.state import State, grows
from .stepping import Tapes

LARGEST = 256  # rows of a graph
WARM_UP = 2  # passes before recording: the first builds kernels, and libraries choose algorithms and allocate
Forward = Callable[[torch.Tensor, State], tuple[torch.Tensor, State]]


def forward_of(model: LanguageModel, batch: int) -> Forward:
    """Choose how tokens (n, 1) are read from a State -> logits (n, 1, V) and the State after them, which may take its
    memory. A frozen model on a GPU is replayed; one that trains is not, because its weights may be gathered, moved and
    hooked; nor one whose State grows, because a graph's memory does not."""
    if recordable(model):
        return Replayed(model, batch)
    return model.forward.advance if isinstance(model.forward, Tapes) else model


def recordable(model: LanguageModel) -> bool:
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    return model.emb.weight.is_cuda and frozen and not grows(model.config)


class Replayed:
    """A model's reading of one token for at most `batch` rows, with a graph for each padded number of them: 1, 2, 4, …

    Results lie in memory that the next call overwrites: a State that is handed back to that call is there already, and
    one that is to last longer must be copied. What cannot be recorded is computed without graphs, and told.
    """

    def __init__(self, model: LanguageModel, batch: int) -> None:
        self.model, self.most, weight = model, min(padded(batch), LARGEST), model.emb.weight
        self.tokens = torch.zeros(self.most, 1, dtype=torch.long, device=weight.device)
        self.state = State.zeros(model.config, self.most, weight.device, weight.dtype)
        self.latest: State | None = None
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, tuple[Any, torch.Tensor]] = {}  # with the logits, by numbers of rows

    def __call__(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        n, size = len(tokens), padded(len(tokens))
        if size <= self.most and size not in self.graphs:
            self.record(size)
        if size > self.most:
            return self.model(tokens, state)
        graph, logits = self.graphs[size]
        if state is not self.latest:
            copy(state, self.state.first(n))
            self.latest = self.state.first(n)
        self.tokens[:n].copy_(tokens)
        graph.replay()
        return logits[:n], self.latest

    def record(self, size: int) -> None:
        """Record how tokens of so many rows are read; if the driver cannot, say so once, and compute without graphs."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # as recording does
            for _ in range(WARM_UP):
                self.compute(size)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                logits = self.compute(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            remedy = "tokens are drawn without CUDA graphs, and more slowly"
            print(f"this GPU's driver cannot record what the model does ({told(error)}); {remedy}", file=sys.stderr)
            self.most = 0
        else:
            self.graphs[size] = graph, logits

    def compute(self, size: int) -> torch.Tensor:
        logits, after = self.model(self.tokens[:size], self.state.first(size))
        copy(after, self.state.first(size))
        return logits


def padded(n: int) -> int:
    """The power of 2 from n on."""
    return 1 << (n - 1).bit_length()


def copy(state: State, to: State) -> None:
    """Overwrite a State, in one launch for each of its fields."""
    for new, old in zip(zip(*state), zip(*to)):
        torch._foreach_copy_([*old], [*new])
