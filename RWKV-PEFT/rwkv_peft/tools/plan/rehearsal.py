"""Measure what a training step holds in memory besides weights and optimizer, by taking it on a model of three blocks.

The model has the run's generation, widths and adapters, so that every method and kernel counts as it is. Its weights
are memory that is never written to; for a GPU the tensors have no data at all (torch's meta device), and operations
take their plain forms. Bytes are linear in the blocks, in the rows and in the tokens of a batch, so that a few small
steps give those of any.
"""

import functools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ...adapters.groups import is_matrix
from ...adapters.inject import count_parameters, inject
from ...adapters.layer import AdapterLinear
from ...adapters.methods import method_of
from ...cli.errors import UserError
from ...cli.names import STATE
from ...config import AdapterConfig, ModelConfig
from ...inference.sampling import sample
from ...inference.settings import Sampling
from ...memory import main_memory
from ...models.family import Family
from ...models.parts import LanguageModel
from ...objectives.cross_entropy import L2WRAP
from ...objectives.divergence import Divergence, of_logits
from ...ops.cross_entropy import cross_entropy_
from ...training.step.zero import live_parameters

DEPTH = 3  # blocks of the rehearsed model: all that follow are like its last one
# Tokens of the shortest rehearsed row. Kernels keep a state at each 64th, some two in the room of one; and the peak of
# a step is linear only if activations outweigh what wide layers need, as in long rows. A CPU has to compute the rows.
TOKENS = MappingProxyType({"cpu": 128, "meta": 512})
LOGITS = 64  # rows of logits that are made to find the bytes of one
DRAWN = 2  # the same of drawing, which computes with them
VOCABULARY = 64  # of the rehearsed model; only logit_bytes takes the true one


# Operations that are not computed. Products of matrices: their values do not matter, and so no weight is read. The
# places at which a mask is not zero: tensors without data cannot tell, so that it is all of them.
SHORTCUTS: Mapping[Any, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        torch.ops.aten.mm.default: lambda a, b: a.new_empty(a.shape[0], b.shape[1]),
        torch.ops.aten.bmm.default: lambda a, b: a.new_empty(*a.shape[:2], b.shape[2]),
        torch.ops.aten.addmm_.default: lambda total, *factors: total,
        torch.ops.aten.baddbmm_.default: lambda total, *factors: total,
        torch.ops.aten.nonzero.default: lambda x: torch.arange(x.numel(), device=x.device)[:, None],
    }
)


class Tracker(TorchDispatchMode):
    """Count the bytes of tensors that are made within and still alive (live), and the most that these were (peak)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, tensors: Any) -> None:
        """Leave tensors out of the count that exist already."""
        self.known.update(tensor.untyped_storage() for tensor in tensors)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shortcut = SHORTCUTS.get(function)
        result = function(*args, **(kwargs or {})) if shortcut is None else shortcut(*args)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class Linear:
    """Bytes of a batch of `rows` rows of `tokens` tokens each: fixed + by_row * rows + by_token * rows * tokens."""

    fixed: float
    by_row: float
    by_token: float

    @classmethod
    def through(cls, tokens: int, one: float, longer: float, wider: float) -> "Linear":
        """Fit to the bytes of one row of `tokens` tokens, of one row of twice as many, and of two rows of `tokens`."""
        by_token = (longer - one) / tokens
        by_row = wider - longer
        return cls(one - by_row - by_token * tokens, by_row, by_token)

    def at(self, rows: int, tokens: int) -> int:
        return max(0, round(self.fixed + self.by_row * rows + self.by_token * rows * tokens))

    def plus(self, other: "Linear", times: float = 1) -> "Linear":
        return Linear(
            self.fixed + times * other.fixed, self.by_row + times * other.by_row, self.by_token + times * other.by_token
        )


@dataclass(frozen=True)
class Step:
    """kept: bytes that the forward pass keeps for the backward pass; states: further bytes of the layers' states until
    the loss is computed; work: further bytes that the backward pass needs at once."""

    kept: Linear
    states: Linear
    work: Linear


@functools.cache
def rehearse(
    family: Family, model: ModelConfig, adapter: AdapterConfig, dtype: torch.dtype, device: torch.device, grad_cp: bool
) -> Step:
    """The Step of a model (its dimensions) and an adapter; dtype that of weights and activations; device: "cpu", or
    "meta", which stands for a GPU. Allocates the weights of three blocks on a CPU, without writing to them. Raises
    UserError if they are more than the machine's memory."""
    depth = min(DEPTH, model.n_layer)
    if device.type == "cpu":
        require_memory(family, replace(model, n_layer=depth, vocab_size=VOCABULARY), dtype)
    length = TOKENS[device.type]
    batches = ((1, length), (1, 2 * length), (2, length))
    found = [
        step_bytes(family, replace(model, n_layer=depth), adapter, dtype, device, grad_cp, rows, tokens)
        for rows, tokens in batches
    ]
    kept, states, work, last = (Linear.through(length, *bytes_of) for bytes_of in zip(*found))
    return Step(kept.plus(last, model.n_layer - depth), states.plus(states, model.n_layer / depth - 1), work)


def require_memory(family: Family, shallow: ModelConfig, dtype: torch.dtype) -> None:
    """Raise UserError if the weights of so few blocks are more than the machine's memory."""
    size = sum(map(math.prod, family.shapes(shallow).values())) * dtype.itemsize
    room, _ = main_memory()
    if size > room:
        raise UserError(
            f"{shallow.n_layer} of the blocks, by which a run on the CPU is planned, take {size / 2**30:,.0f} GiB, and "
            f"this machine has {room / 2**30:,.0f} GiB; plan for a GPU with --gpu 24GiB, or give smaller dimensions"
        )


def step_bytes(
    family: Family,
    config: ModelConfig,
    adapter: AdapterConfig,
    dtype: torch.dtype,
    device: torch.device,
    grad_cp: bool,
    rows: int,
    tokens: int,
) -> tuple[int, float, int, float]:
    """Take one step -> bytes that are (kept for the backward pass, held by states until the loss is computed, needed by
    the backward pass at once, kept of the last block)."""
    model = build(family, replace(config, vocab_size=VOCABULARY), adapter, grad_cp).to(dtype).to_empty(device=device)
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            buffer.zero_()  # an index, which must name a place
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    batch = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    tracker = Tracker()
    tracker.ignore([*model.parameters(), *model.buffers(), batch])
    ends = [0]  # the bytes that are alive as each block ends
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ends.append(tracker.live))
    with tracker:
        loss, states = model(batch, head=lambda x, weight: (x @ weight.t()).sum())
        held = tracker.live
        del states
        kept = tracker.peak = tracker.live
        loss.backward()
    of_block = ends[-1] - ends[-2] - (held - kept) / config.n_layer  # less its states
    return kept, held - kept, tracker.peak - kept, of_block


def _drop(parameter: torch.Tensor) -> None:
    """Free a parameter's gradient, because parts.py counts gradients."""
    parameter.grad = None


def build(family: Family, config: ModelConfig, adapter: AdapterConfig, grad_cp: bool) -> LanguageModel:
    """Build the model with its adapters, on the meta device."""
    with torch.device("meta"):
        model = family.build(config, grad_cp)
        if STATE in adapter.train_parts:
            model.tune_states()
        inject(model, replace(adapter, quant="none"), family=family, initial=_constants(model, adapter, family))
    return model.train()


def _constants(model: torch.nn.Module, adapter: AdapterConfig, family: Family) -> Mapping[str, torch.Tensor]:
    """{"<module>.<constant>": tensor} of empty tensors for the factors that a method would compute from the weights."""
    method = method_of(adapter)
    if method is None or method.held is None:
        return {}
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            shapes = method.tensors.shapes(adapter, module.out_features, module.in_features)
            found |= {f"{name}.{constant}": torch.empty(shapes[constant]) for constant in method.constants}
    return found


@functools.cache
def logit_bytes(vocabulary: int, dtype: torch.dtype, device: str, taught: bool = False) -> float:
    """Bytes that the loss needs at once for a token of a chunk: logits and their gradient, as the kernel holds them;
    `taught` with those of a teacher."""
    hidden = torch.empty(LOGITS, 1, dtype=dtype, device=device)
    weight = torch.empty(vocabulary, 1, dtype=dtype, device=device)
    targets = torch.zeros(LOGITS, dtype=torch.long, device=device)
    tracker = Tracker()
    tracker.ignore([hidden, weight, targets])
    with tracker:
        if taught:
            of_logits(
                F.linear(hidden, weight), F.linear(hidden, weight), targets, 1.0, Divergence("jsd", 0.5, 1.0, 0.5)
            )
        else:
            cross_entropy_(F.linear(hidden, weight), targets, 1.0, L2WRAP)
    return tracker.peak / LOGITS


@functools.cache
def drawing_bytes(vocabulary: int, top_p: float) -> float:
    """Bytes that drawing a token of one answer needs at once, which is float32 logits and what is made of them."""
    tracker = Tracker()
    with tracker:
        sample(torch.zeros(DRAWN, vocabulary), [0.5] * DRAWN, Sampling(top_p=top_p))
    return tracker.peak / DRAWN


class Counts(NamedTuple):
    """Numbers of elements in a model with its adapters: total: all parameters; trains: those that train; matrices:
    those that train in matrices of blocks and adapters; own: the adapters' own; quantized: those that are quantized;
    constants: the adapters' constants; live: parameters that ZeRO-3 keeps gathered."""

    total: int
    trains: int
    matrices: int
    own: int
    quantized: int
    constants: int
    live: int


@functools.cache
def count(family: Family, model: ModelConfig, adapter: AdapterConfig) -> Counts:
    """Count the parameters of a model (its dimensions) and an adapter."""
    built = build(family, model, adapter, grad_cp=False)
    adapted = [module for module in built.modules() if isinstance(module, AdapterLinear)]
    weights = sum(module.weight.numel() for module in adapted)
    constants = sum(buffer.numel() for module in adapted for buffer in module.buffers())
    own = sum(module.get_parameter(name).numel() for module in adapted for name in module.method.parameters)
    trains, total = count_parameters(built)
    training = ((name, each) for name, each in built.named_parameters() if each.requires_grad)
    matrices = sum(each.numel() for name, each in training if is_matrix(name, each))
    return Counts(
        total, trains, matrices, own, weights if adapter.quant != "none" else 0, constants, live_parameters(built)
    )
