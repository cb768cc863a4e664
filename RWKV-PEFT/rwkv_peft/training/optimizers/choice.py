"""Make the optimizer of --optim and --strategy; packages of others than AdamW are imported only then."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from ...cli.tables import OPTIMS
from ...config import TrainConfig
from .cpu_adam import cpu_adam


@runtime_checkable
class Further(Protocol):
    """An optimizer of OPTIMS, with the interface beyond torch's that the engine and checkpoints use.

    by_parameter: true if each number that trains has state of its own, which any ranks can resume from; if not, a
    rank's state is of use to that rank alone.
    """

    by_parameter: bool
    param_groups: list[dict[str, Any]]

    def begin(self, flat: torch.Tensor) -> None:
        """Initialize the state of a flat tensor of weights, as before the first step."""


@runtime_checkable
class Averaging(Further, Protocol):
    """An optimizer that results in an average of its weights: eval() puts it into the weights, train() takes it
    out."""

    @property
    def averaging(self) -> bool:
        """True if the weights are the average now."""

    def go_on(self, rates: Iterable[float]) -> None:
        """Go on after steps at these base learning rates."""

    def eval(self) -> None: ...

    def train(self) -> None: ...


def make_optimizer(groups: Sequence[dict[str, Any]], train: TrainConfig) -> Any:
    """Make the optimizer over parameter groups; Lit sets the learning rate before each step."""
    if train.optim != "adamw":
        return OPTIMS[train.optim].of(groups, train)
    settings: dict[str, Any] = {"lr": train.lr_init, "betas": (train.beta1, train.beta2), "eps": train.adam_eps}
    return cpu_adam(groups, **settings) if train.offload else torch.optim.AdamW(groups, fused=True, **settings)
