"""The engines that move a model's weights. loop.py calls four methods of them; checkpoints use the rest.

Plain is one device, without DeepSpeed. torch's optimizer moves a float32 copy of the weights that train (the master).
zero.py has Zero: several ranks, ZeRO-3, offload. Both keep the master as flat tensors, one a parameter group.
Optimizers and checkpoints see the same of both; a run may go on with the other.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.groups import parameter_groups
from ..config import RunConfig, TrainConfig
from ..models.parts import LanguageModel
from .optimizers import begin_state, make_optimizer
from .ranks.world import World
from .rates import group_rates
from .saving.optimizer_state import FIRST, MASTER, Fragment
from .step.shared_prefix import tokens_read
from .step.steps import Step

STEP = "step"  # Adam's count of steps in its state
SHORT = 4096  # numbers whose squares are added up in float32
ALIGNMENT = 2  # DeepSpeed pads flat tensors to a multiple, so that 8-bit moments have the same blocks here


MANY = 256  # gradients: from about here on, one more hardly changes a sum of bfloat16, whose significand has 8 bits


def sums_apart(train: TrainConfig) -> bool:
    """True if DeepSpeed adds gradients of micro batches up in float32, in a buffer of its own (else in bfloat16)."""
    return train.stage == 2 and train.precision == "bf16" and train.accumulate_grad_batches > 1


def loses_in_sums(train: TrainConfig) -> bool:
    """True if so many gradients add up in bfloat16 that the last of them hardly count.

    With 1,024 similar ones the sum was 10 % off (the norm 8 % too small); with 256, 2 % (1 % in float32).
    """
    in_bfloat16 = train.uses_zero and train.precision == "bf16" and not train.offload and not sums_apart(train)
    return in_bfloat16 and train.accumulate_grad_batches >= MANY


class ParameterSlice(NamedTuple):
    """The part of a parameter that this rank updates: `length` of its `size` elements from `start` on, which begin at
    element `offset` of flat tensor `number`."""

    size: int
    start: int
    number: int
    offset: int
    length: int


class TrainingEngine(ABC):
    """Moves the weights of a run's model that train by the gradients of micro batches.

    compute gives a batch's loss; device is the model's; rank and ranks: this process's number, and how many there are.
    optimizer: torch's, over the flat tensors of float32. group_names: the names of each group's parameters, in order.
    firsts: copies of the masters at the run's start, in main memory, if they are kept.
    """

    optimizer: Any
    firsts: Sequence[Tensor] = ()

    def __init__(
        self, model: LanguageModel, compute: Step, config: RunConfig, world: World, device: torch.device
    ) -> None:
        self.model, self.compute, self.device = model, compute, device
        self.rank, self.ranks = world.rank, world.size
        train = config.train
        self.micro_batches, self.clip = train.accumulate_grad_batches, train.gradient_clip_val
        self.groups = parameter_groups(
            model, train.weight_decay, *group_rates(config), matrices_apart=train.optim == "muon"
        )
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.group_names = [[names[parameter] for parameter in group["params"]] for group in self.groups]

    # What the loop calls

    def forward(self, batch: Mapping[str, Any], count: float) -> tuple[Tensor, int]:
        """A micro batch on the device -> its loss (), divided by count and differentiable, and the tokens that were
        read. Of prompts, the model samples completions here."""
        whole = self.compute.complete_batch(self.model, batch)
        return self.compute.loss(self.model, whole, count), tokens_read(whole)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add a micro batch's gradients, divided by the number of micro batches, to those of the step."""

    @abstractmethod
    def step(self, rate: float) -> float | None:
        """Clip the step's gradients, and move the weights by them at a base learning rate.

        -> the gradients' norm before clipping, over all ranks: not finite if it cannot be used; None if float16
        overflowed, so that the step was skipped and the loss scale lowered."""

    def scale_metrics(self) -> dict[str, float]:
        """{"loss_scale", "skipped"} in float16, else {}."""
        return {}

    # What checkpoints and measurements use

    def copies(self) -> list[Tensor]:
        """Copies of the masters in main memory."""
        return [flat.detach().to("cpu", copy=True) for flat in self.flats]

    @property
    @abstractmethod
    def flats(self) -> Sequence[Tensor]:
        """The flat float32 masters (n,) that this rank updates."""

    @abstractmethod
    def place(self, parameter: Any) -> ParameterSlice:
        """The part of a parameter that this rank updates."""

    @abstractmethod
    def publish(self) -> None:
        """Give the model the masters' values. Every rank calls it at once."""

    def whole(self, tensor: Tensor) -> AbstractContextManager[object]:
        """Within, a parameter of the model is whole on every rank."""
        return nullcontext()

    def barrier(self) -> None:  # noqa: B027 # there is nobody to wait for on one device
        """Wait for all ranks."""

    def counters(self) -> dict[str, float]:
        """The counters of float16's loss scale, {} if there is none."""
        return {}

    def set_counters(self, counters: Mapping[str, float]) -> None:  # noqa: B027 # most engines have none
        """Go on with a checkpoint's counters of the loss scale."""

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    @property
    def is_by_parameter(self) -> bool:
        """True if the optimizer's state has a number for each of a parameter's: any ranks can go on with it."""
        return getattr(self.optimizer, "by_parameter", True)

    def pieces(self) -> Iterator[Fragment]:
        """This rank's fragments of the parameters that train, with their moments if these are by parameter."""
        flats = self.flats
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            size, start, number, offset, length = self.place(parameter)
            if length <= 0:
                continue
            tensors = {MASTER: flats[number].data} | ({FIRST: self.firsts[number]} if self.firsts else {})
            if self.is_by_parameter:
                tensors |= moments_in(begin_state(self.optimizer, flats[number]))
            yield Fragment(
                name, size, start, {kind: tensor.narrow(0, offset, length) for kind, tensor in tensors.items()}
            )

    def codes(self) -> dict[str, Tensor]:
        """This rank's state that is not by parameter: {NUMBER:NAME: tensor}, of the NUMBERth flat tensor."""
        if self.is_by_parameter:
            return {}
        return {
            f"{number}:{name}": value
            for number, flat in enumerate(self.flats)
            for name, value in begin_state(self.optimizer, flat).items()
            if isinstance(value, Tensor) and name not in ("qmap1", "qmap2")  # tables of the codes, the same for all
        }

    @property
    def steps_taken(self) -> int:
        """The number of steps that the optimizer has taken, 0 if it does not count them."""
        return max((int(begin_state(self.optimizer, flat).get(STEP, 0)) for flat in self.flats), default=0)

    @torch.no_grad()
    def go_on(self, steps: int) -> None:
        """Go on behind `steps` steps, with the masters and moments that pieces() were filled with. Every rank calls it
        at once."""
        for flat in self.flats:
            state = begin_state(self.optimizer, flat)
            if STEP in state:
                state[STEP] = torch.full_like(state[STEP], steps) if isinstance(state[STEP], Tensor) else steps
        self.publish()


def moments_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state that have a number for each of the weights'."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() == 1}


class Plain(TrainingEngine):
    """One device. Gradients of micro batches add up in float32; the arithmetic is that of ZeRO on one rank."""

    def __init__(
        self, model: LanguageModel, compute: Step, config: RunConfig, world: World, device: torch.device
    ) -> None:
        super().__init__(model, compute, config, world, device)
        model.to(device)
        self.masters: list[Tensor] = []
        self.places: dict[nn.Parameter, ParameterSlice] = {}
        for number, group in enumerate(self.groups):
            sizes = [parameter.numel() for parameter in group["params"]]
            padded = -(-sum(sizes) // ALIGNMENT) * ALIGNMENT
            # (padded,): the padding stays zero, as its gradient is
            flat = torch.zeros(padded, dtype=torch.float32, device=self.device)
            offset = 0
            for parameter, size in zip(group["params"], sizes):
                # memory of its own: it may lie in the base's mapped file, or beside others
                parameter.data = parameter.data.clone()
                flat[offset : offset + size].copy_(parameter.data.reshape(-1))
                self.places[parameter] = ParameterSlice(size, 0, number, offset, size)
                offset += size
            # The optimizer sees these alone. The model's parameters are copies in its own dtype, written by publish().
            self.masters.append(flat.requires_grad_())
        groups = [group | {"params": [flat]} for group, flat in zip(self.groups, self.masters)]
        self.optimizer = make_optimizer(groups, config.train)
        self.scale = LossScale() if config.train.precision == "fp16" else None
        self.sums: list[list[Tensor]] = []  # by group and parameter, of more than one micro batch
        self.skipped = False

    def backward(self, loss: Tensor) -> None:
        # Two divisions and a product leave the bits of runs before, which Lightning and DeepSpeed both divided.
        loss = loss * self.micro_batches / self.micro_batches / self.micro_batches
        if self.scale is not None:
            # After the divisions, as in DeepSpeed: another order would round to other bits.
            loss = loss * self.scale.cur_scale
        loss.backward()
        if self.micro_batches > 1:
            self.add_up()

    def add_up(self) -> None:
        """Add the gradients of a micro batch to the step's float32 sums."""
        gradients = self.take_gradients()
        if not self.sums:
            self.sums = [[gradient.float() for gradient in group] for group in gradients]
            return
        for sums, group in zip(self.sums, gradients):
            for total, gradient in zip(sums, group):
                total += gradient

    def take_gradients(self) -> list[list[Tensor]]:
        """The parameters' gradients by group, zeros where a loss did not reach one; the parameters have none then."""
        gradients = [[_gradient(parameter) for parameter in group["params"]] for group in self.groups]
        for parameter in self.places:
            parameter.grad = None
        return gradients

    @torch.no_grad()
    def step(self, rate: float) -> float | None:
        self.set_rate(rate)
        # Taken off the parameters before anything can fail, so that a skipped step leaves none behind.
        gradients, self.sums = self.sums or self.take_gradients(), []
        scale = 1.0 if self.scale is None else self.scale.cur_scale
        scaled = torch.linalg.vector_norm(torch.stack([gradient_norm(group) for group in gradients]))
        norm = scaled / scale
        if self.scale is not None:
            overflow = not math.isfinite(scaled.item())
            # Read before update(), which lowers them: with the scale at its least no later step would be any better.
            lowers = self.scale.cur_scale > self.scale.min_scale or self.scale.cur_hysteresis > 1
            self.scale.update(overflow)
            self.skipped = overflow and lowers
            if overflow:
                return None if self.skipped else math.inf  # a norm of inf ends the run as diverged
        # clip in float32, in the order of ZeRO's: divide by the scale, and by the part of the norm that is too much
        factor: Any = scale
        if self.clip > 0:
            factor = torch.clamp((norm + 1e-6) / self.clip, min=1.0) * scale
        for master, group, tensors in zip(self.masters, self.groups, gradients):
            # Cast to float32 first and scaled then: in bfloat16 the product would round once more.
            flat = torch.zeros_like(master, requires_grad=False)
            for (*_, offset, length), gradient in zip(map(self.place, group["params"]), tensors):
                flat[offset : offset + length].copy_(gradient.reshape(-1))
            if self.clip > 0 or scale != 1.0:
                flat.mul_(1.0 / factor)
            master.grad = flat
        self.optimizer.step()
        for master in self.masters:
            # A whole float32 copy of what trains: not to be kept until the next step.
            master.grad = None
        self.publish()
        return norm.item()

    def scale_metrics(self) -> dict[str, float]:
        return {} if self.scale is None else {"loss_scale": self.scale.cur_scale, "skipped": int(self.skipped)}

    @property
    def flats(self) -> Sequence[Tensor]:
        return self.masters

    def place(self, parameter: Any) -> ParameterSlice:
        return self.places[parameter]

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, (_, _, number, offset, length) in self.places.items():
            parameter.copy_(self.masters[number][offset : offset + length].view(parameter.shape))

    def counters(self) -> dict[str, float]:
        return {} if self.scale is None else dict(vars(self.scale))

    def set_counters(self, counters: Mapping[str, float]) -> None:
        if self.scale is not None:
            vars(self.scale).update((name, counters[name]) for name in vars(self.scale).keys() & counters.keys())


def _gradient(parameter: nn.Parameter) -> Tensor:
    # Weight decay and momentum go on for a parameter that no loss reached, as under ZeRO.
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class LossScale:
    """The factor of the loss that keeps float16's gradients from vanishing (Micikevicius et al. 2018, arXiv
    1710.03740): halved if they overflow twice; doubled after WINDOW steps without. DeepSpeed's has the same counters
    under the same names."""

    WINDOW, FACTOR, HYSTERESIS, min_scale = 1000, 2.0, 2, 1.0

    def __init__(self) -> None:
        self.cur_scale = 2.0**16
        self.cur_iter, self.last_overflow_iter, self.cur_hysteresis = 0, -1, self.HYSTERESIS

    def update(self, overflow: bool) -> None:
        """Count a step."""
        if overflow:
            if self.cur_hysteresis == 1:
                self.cur_scale = max(self.cur_scale / self.FACTOR, self.min_scale)
            else:
                self.cur_hysteresis -= 1
            self.last_overflow_iter = self.cur_iter
        else:
            # As DeepSpeed counts, so that a checkpoint of either engine goes on in the other with the same scales.
            stable = self.cur_iter - self.last_overflow_iter - 1
            if stable > 0 and stable % self.WINDOW == 0:
                self.cur_hysteresis = self.HYSTERESIS
                self.cur_scale *= self.FACTOR
        self.cur_iter += 1


def square_sum(x: Tensor) -> Tensor:
    """Sum the squares of x (any shape, bfloat16 or float32), to float32's rounding -> float64 ().

    float32 adds up the squares of SHORT numbers at a time; float64 adds up these sums. On a CPU a conversion of all to
    float64 would take longer than the optimizer's step. Infinite if SHORT squares exceed float32's range, that is if
    their root exceeds 1.8e19.
    """
    flat = x.detach().reshape(-1)
    whole = flat.numel() // SHORT * SHORT
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, SHORT), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return norms.double().square().sum() + rest.double().square()


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together: float32 (), on their device."""
    tensors = list(gradients)
    if tensors and tensors[0].device.type != "cpu":  # a few launches for all
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, torch.float32)))
    return sum(map(square_sum, tensors), torch.zeros((), dtype=torch.float64)).sqrt().float()
