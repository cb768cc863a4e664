"""CUDA graphs on a CPU: torch's operations are recorded, and replayed into the memory that they wrote when recorded.

As on a GPU, recording computes nothing (its results are NaN afterwards), and may neither read tensors nor use the
host's numbers; a replay reads its inputs from the recorded memory and overwrites the last replay's results. Only
torch's operations are replayed, and our kernels are none: `emulate` makes the blocks take plain torch, which finds
packed sequences without reading their bounds, as the kernels do.
"""

from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a host would wait for, or copy to the GPU from memory that is not pinned, as torch.tensor does.
REFUSED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh")


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph, and records while it is entered. replays: the number of all replays."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():  # which hands over whole what is made of other operations
            with self:
                if (out := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                    return out
        name = func._schema.name.split("::")[1]
        assert name not in REFUSED, f"{name} reads a result, or the host's numbers, while a graph is recorded"
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def results(self, func, out):
        """The tensors in a call's result that the call made, in order."""
        made = [result.alias_info is None for result in func._schema.returns]
        if not made:
            return []
        outs = out if isinstance(out, (tuple, list)) and len(made) > 1 else [out]
        pairs = zip(made, outs) if len(made) == len(outs) else ((made[0], one) for one in outs)
        return [leaf for own, one in pairs if own for leaf in tree_leaves(one) if isinstance(leaf, torch.Tensor)]

    def spoil(self):
        for func, _, _, out in self.calls:
            for tensor in self.results(func, out):
                tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)

    def replay(self):
        Graph.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for tensor, value in zip(self.results(func, out), self.results(func, again)):
                    tensor.data.copy_(value)


@contextmanager
def record(graph, pool, capture_error_mode):
    """Stands in for torch.cuda.graph."""
    assert pool == "pool" and capture_error_mode == "thread_local" and not graph.calls
    with graph:
        yield
    with torch.no_grad():
        graph.spoil()


def walked(recurrence, rows):
    """A recurrence in plain torch, with so many inputs (B, T, H, N): it walks packed sequences token by token, each
    from the state of its own sequence."""

    def walk(*tensors):
        *inputs, state, bounds = tensors
        if bounds is None:
            return recurrence(*tensors)
        _, T, H, N = inputs[0].shape
        states = torch.zeros(len(bounds) - 1, H, N, N) if state is None else state
        sequences, ys = torch.searchsorted(bounds[1:].contiguous(), torch.arange(T), right=True), []
        for t, at in enumerate(sequences.split(1)):
            token = [x[:, t : t + 1] for x in inputs[:rows]]
            y, after = recurrence(*token, *inputs[rows:], states.index_select(0, at))
            states = states.index_copy(0, at, after)
            ys.append(y)
        return torch.cat(ys, dim=1), states

    return walk


def emulate(patch):
    """Put the emulation in place of CUDA graphs, by patch(owner, name, value)."""
    from rwkv_peft.ops import bone
    from rwkv_peft.ops.mix import cpu
    from rwkv_peft.ops.recurrence import signature
    from rwkv_peft.ops.wkv6 import WKV6
    from rwkv_peft.ops.wkv7 import WKV7

    patch(torch.cuda, "CUDAGraph", Graph)
    patch(torch.cuda, "graph", record)
    patch(torch.cuda, "graph_pool_handle", lambda: "pool")
    patch(torch.cuda, "Stream", MagicMock)
    patch(torch.cuda, "current_stream", MagicMock)
    patch(torch.cuda, "stream", lambda stream: nullcontext())
    patch(cpu.FAMILY, "takes", lambda *_: False)
    patch(bone, "backend", lambda *_, **__: None)
    patch(signature, "_has_values", lambda x: False)  # which are read of a CPU's at each call, of a GPU's once
    for recurrence in (WKV6, WKV7):
        patch(recurrence, "choose", lambda *_: "reference")
        patch(recurrence, "reference", walked(recurrence.reference, recurrence.row_count))
