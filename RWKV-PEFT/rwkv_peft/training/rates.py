"""Choose the learning rate of a run without --lr_init, by the model's width, the method's first step and the objective.

docs/guides/learning-rates.md has the formulas, their evidence and the cases in which they mislead.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..adapters.groups import learning_ratios
from ..adapters.methods import method_of
from ..cli.names import STATE, is_number, is_whole
from ..config import STATE_LR_ALONE, AdapterConfig, Objective, RunConfig, TrainConfig
from ..models import family_named
from ..models.family import Family
from ..models.layout import SHIFT, TIME_STATE

# rates times the model's channels: Bone's, that of the weights of a base themselves, and that of a new model's
ANCHOR, WHOLE, NEW = 0.08, 0.06, 0.4
FALL = 0.1  # the last rate over the first


class Rate(NamedTuple):
    """A learning rate to two digits, with its reason."""

    value: float
    reason: str


def automatic_rate(adapter: AdapterConfig, n_embd: int, objective: Objective | None = None, new: bool = False) -> Rate:
    """The Rate of an adapter on a model of n_embd channels, for an objective (None: next tokens); `new`: the model has
    learned nothing yet."""
    if adapter.states_alone:
        return Rate(STATE_LR_ALONE, "that of states")
    method = method_of(adapter)
    step, anchor = 1.0, ANCHOR if method is not None else NEW if new else WHOLE
    reason = f"{anchor:g} / {n_embd} channels"
    if method is not None and (step := method.step(method, adapter, n_embd)) != 1:
        reason = f"bone's {reason}, over {step:.2g}, {method.label}'s first step in the weight where bone's is 1"
    pace = 1.0 if objective is None else objective.pace
    if objective is not None and pace != 1:
        reason += f", times {pace:g} for {objective.name}"
    return Rate(float(f"{pace * anchor / n_embd / step:.2g}"), reason)


def group_rates(config: RunConfig) -> tuple[Family | None, tuple[tuple[str, float], ...]]:
    """The family and the ratios by which parameter_groups sets the rates of a run's parameters."""
    adapter, train = config.adapter, config.train
    ratios = learning_ratios(method_of(adapter), adapter)
    if STATE in adapter.train_parts and not adapter.states_alone:
        ratios += tuple((name, train.state_lr / train.lr_init) for name in (TIME_STATE, SHIFT))
    return family_named(config.model.version) if train.layerwise_lr else None, ratios


def with_chosen_rates(train: TrainConfig, rate: float) -> TrainConfig:
    """Return the TrainConfig with `rate` as lr_init and FALL times that as lr_final, if these are to be chosen."""
    values: dict[str, Any] = {"lr_init": rate, "lr_final": float(f"{rate * FALL:.2g}")}
    return replace(train, **{name: values[name] for name in train.lr_chosen})


def with_first_rates(train: TrainConfig, state: Mapping[str, Any]) -> TrainConfig:
    """The TrainConfig with automatic rates set to the run's first ones, from the state.json of a checkpoint. A later
    version may choose others and goes on with these."""
    then = state.get("config", {}).get("train", {})
    values: dict[str, Any] = {name: float(then[name]) for name in train.lr_chosen if is_number(then.get(name))}
    return replace(train, **values)


def with_chosen_epochs(
    train: TrainConfig, objective: Objective, epoch_steps: int, state: Mapping[str, Any] | None
) -> TrainConfig:
    """Fill in the number of epochs if it is to be chosen: the objective's aim of steps, at `epoch_steps` an epoch.

    A run that goes on keeps its first number, by its checkpoint's state.json (None: a new run).
    """
    if not train.epochs_chosen:
        return train
    then = {} if state is None else state.get("config", {}).get("train", {})
    began = then.get("epoch_count")
    return replace(train, epoch_count=began if is_whole(began, 1) else -(-objective.aim // epoch_steps))
