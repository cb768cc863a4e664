"""A training step's loss. Whole computes a batch at once; segments.py and context_parallel.py compute it in parts.

Each step gives a batch's loss, differentiable in the parameters that train. It also gives the loss's sum without
gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ...adapters.layer import untrained
from ...config import Objective
from ...config.objective import Passes
from ...models.parts import HeadFunction
from ...objectives.next_token import NextToken
from ...ops.recurrence.signature import check_copy
from .shared_prefix import Contexts, prefix_states, share_prefixes, teacher_batch

Batch = Mapping[str, Any]  # tensors by name, and facts about them
Tensors = Sequence[torch.Tensor]
Gradient = Sequence[torch.Tensor | None]  # one for each tensor, None for those that it does not reach
ForwardFunction = Callable[[nn.Module, Batch, HeadFunction], torch.Tensor]  # (model, batch, head) -> head's result
NEXT_TOKEN = NextToken()
PACKED = (("tokens", "cu_seqlens"), ("shared", "shared_seqlens"), ("teacher_tokens", "teacher_cu_seqlens"))


class Step(ABC):
    """The loss that a run trains and validates with, for batches of TrainBatches or EvalBatches.

    measures: the objective's figures for the last batch by name, 0-dim tensors, divided as its loss is.
    figures: the same of the previous optimizer step, over all ranks and micro batches; {} in the first.
    """

    objective: Objective
    measures: Mapping[str, torch.Tensor] = MappingProxyType({})
    figures: Mapping[str, float] = MappingProxyType({})

    def prepare_inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """A batch on the CPU -> the same on the device, laid out for this step."""
        return to_device(batch, device)

    def complete_batch(self, model: nn.Module, batch: Batch) -> Batch:
        """A batch with all that its loss reads; of prompts, the model samples the completions here."""
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        """A batch's loss (), the sum over the objective's items divided by count, differentiable."""

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum of a batch's losses ()."""
        return self.loss(model, batch, 1)

    def items(self, batch: Batch) -> torch.Tensor:
        """The number of losses in a batch, ()."""
        return self.objective.items(batch)


def plain_forward(model: nn.Module, batch: Batch, head: HeadFunction) -> torch.Tensor:
    """Head's result after the model's forward over a batch; shared prefixes, if any, are computed first."""
    state = prefix_states(model, batch) if "shared" in batch else None
    return model(batch["tokens"], state, batch.get("cu_seqlens"), head, keep=False)[0]


class Whole(Step):
    """All positions of a batch at once.

    forward_fn runs the model, with its adapters off for the reference pass. Teacher log-probabilities come from
    `teacher`, or without it from the model with its adapters off. group: packed documents that share a prompt (0:
    none), computed once for them. contexts caches the teacher's states after contexts; without it the teacher reads
    whole rows.
    """

    teacher_fn: ForwardFunction = staticmethod(plain_forward)

    def __init__(
        self,
        objective: Objective = NEXT_TOKEN,
        forward_fn: ForwardFunction = plain_forward,
        group: int = 0,
        teacher: nn.Module | None = None,
        contexts: Contexts | None = None,
    ) -> None:
        self.objective, self.forward_fn, self.group, self.teacher = objective, forward_fn, group, teacher
        self.contexts = contexts
        if contexts is not None:
            self.teacher_fn = contexts.forward

    def prepare_inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        laid = dict(batch)
        if self.group:
            laid |= share_prefixes(batch, self.group)
        if self.contexts is not None:
            laid |= self.contexts.split(batch)
        return to_device(laid, device)

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        passes = Passes(
            partial(self.forward_fn, model, batch),
            partial(self.reference_pass, model, batch),
            partial(self.teacher_pass, model, batch),
            self.figures,
            torch.is_grad_enabled(),
        )
        loss, self.measures = self.objective.loss(passes, batch, count)
        return loss

    @torch.no_grad()
    def reference_pass(self, model: nn.Module, batch: Batch, head: HeadFunction) -> torch.Tensor:
        """Head's result after the forward of the model as it was before training."""
        with untrained(model):
            return self.forward_fn(model, batch, head)

    @torch.no_grad()
    def teacher_pass(self, model: nn.Module, batch: Batch, head: HeadFunction) -> torch.Tensor:
        """Head's result after the teacher's forward over its own tokens of a batch."""
        seen = teacher_batch(batch)
        if self.teacher is not None:
            return self.teacher_fn(self.teacher, seen, head)
        with untrained(model):
            return self.teacher_fn(model, seen, head)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Copy a batch's tensors from the CPU to a device, without waiting for a GPU; the rest stays as it is.

    Operations take the bounds of packed sequences from the CPU: reading a GPU's copy would wait for the GPU.
    """
    moved = {
        name: copy_to(value, device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    for row, bounds in PACKED:
        if batch.get(bounds) is not None:
            check_copy(moved[bounds], batch[bounds], batch[row].shape[1])
    return moved


def copy_to(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the CPU -> the same on a device; the copy may still be on its way if that is a GPU."""
    return x.to(device) if device.type != "cuda" else x.contiguous().pin_memory().to(device, non_blocking=True)


def seed_micro_batch(seed: int, number: int) -> None:
    """Seed torch for the micro batch of this number in a run. Its random numbers depend on the run's seed, the step and
    the place in it alone, whichever rank has it: a resumed run repeats them."""
    # Primes spread neighbouring seeds and numbers over the 63 bits that manual_seed takes.
    torch.manual_seed((seed * 1_000_003 + number) * 65_537 % 2**63)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def add_gradients(sums: list[torch.Tensor], gradients: Gradient, parameters: Tensors) -> None:
    """Add gradients to `sums`: [] at first, then float32 at least. In bfloat16 a sum of many loses the small ones."""
    if not sums:
        shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in parameters]  # whole under ZeRO-3
        wide = torch.promote_types(torch.float32, parameters[0].dtype)
        sums += [torch.zeros(shape, dtype=wide, device=parameters[0].device) for shape in shapes]
    for total, gradient in zip(sums, gradients):
        if gradient is not None:
            total += gradient


def with_gradients(loss: torch.Tensor, gradients: Tensors, parameters: Tensors) -> torch.Tensor:
    """The loss (), with a backward that hands gradients computed before to the parameters, once each, as ZeRO needs."""
    cut = [p for p in parameters if p.shape != getattr(p, "ds_shape", p.shape)]
    # A parameter's shape is empty while ZeRO-3 has it cut, and autograd compares a gradient's shape with it.
    if cut:  # ZeRO-3's shards are gathered, because a gradient needs the whole shape; it shards again after backward
        cut[0].all_gather(param_list=cut)  # type: ignore[attr-defined]
    return WithGradients.apply(loss, gradients, *parameters)


class WithGradients(torch.autograd.Function):
    """The loss as it is; backward returns the parameters' given gradients times its own."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: Tensors, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients, ctx.dtypes = gradients, [parameter.dtype for parameter in parameters]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *((total * grad).to(dtype) for total, dtype in zip(ctx.gradients, ctx.dtypes))
