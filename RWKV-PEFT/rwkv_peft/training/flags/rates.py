"""Choose the learning rate of a run that is given none: Bone's by the model's width, another method's also by its first
step.

docs/guides/learning-rates.md has the formulas, their evidence, and the cases in which they mislead.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ...adapters.methods import method_of
from ...config import AIM, MOST_EPOCHS, STATE_LR, AdapterConfig, Objective, TrainConfig
from ...errors import UserError

ANCHOR = 0.08  # Bone's rate times the model's channels
FALL = 0.1  # the last rate over the first


class Rate(NamedTuple):
    """A learning rate, to two digits, and the reason for it."""

    value: float
    reason: str


def known_rate(adapter: AdapterConfig, n_embd: int) -> Rate | None:
    """The Rate of an adapter on a model of n_embd channels, None if there is no rule for it."""
    method = method_of(adapter)
    if adapter.states_alone:
        return Rate(STATE_LR, "that of states")
    step = None if method is None else method.first_step(adapter, n_embd)
    if method is None or step is None:
        return None
    reason = f"{ANCHOR:g} / {n_embd} channels"
    if step != 1:
        reason = f"bone's {reason}, over {step:.2g}, {method.label}'s first step in the weight where bone's is 1"
    return Rate(float(f"{ANCHOR / n_embd / step:.2g}"), reason)


def automatic_rate(adapter: AdapterConfig, n_embd: int) -> Rate:
    """The Rate for --lr_init auto. Raises UserError if there is no rule."""
    if found := known_rate(adapter, n_embd):
        return found
    method, bone = method_of(adapter), ANCHOR / n_embd
    if method is None:
        raise UserError(
            "--lr_init auto has no rule for the model itself (--peft none), of whose rates nothing was measured here; "
            "give a number: others fine-tune models of some billion parameters at 1e-5"
        )
    raise UserError(
        f"--lr_init auto: how far {method.label} moves a weight depends on the weight, and there is no rule; give a "
        f"number, {bone:.1g} to {10 * bone:.1g} to begin with here, or ask rwkv-peft compare"
    )


def follows_rule(adapter: AdapterConfig, objective: Objective) -> bool:
    """Tell whether the rule gives a run's rate: it is for the loss of tokens, and states alone have their own."""
    return not adapter.states_alone and objective.of_tokens


def with_chosen_rates(train: TrainConfig, rate: float) -> TrainConfig:
    """Return the TrainConfig with `rate` as lr_init and FALL times that as lr_final, if these are to be chosen."""
    values: dict[str, Any] = {"lr_init": rate, "lr_final": float(f"{rate * FALL:.2g}")}
    return replace(train, **{name: values[name] for name in train.lr_chosen})


def with_first_rates(train: TrainConfig, state: Mapping[str, Any]) -> TrainConfig:
    """Return the TrainConfig with the rates that the flags left to be chosen set to those that the run began with, from
    the state.json of a checkpoint, whatever would be chosen now."""
    then = state.get("config", {}).get("train", {})
    values: dict[str, Any] = {
        name: float(then[name]) for name in train.lr_chosen if isinstance(then.get(name), (int, float))
    }
    return replace(train, **values)


def with_chosen_epochs(train: TrainConfig, epoch_steps: int, state: Mapping[str, Any] | None) -> TrainConfig:
    """Fill in the number of epochs if it is to be chosen: as many as make AIM steps at `epoch_steps` an epoch,
    MOST_EPOCHS at most. A run that goes on keeps what it began with, by its checkpoint's state.json (None: a new
    run)."""
    if not train.epochs_chosen:
        return train
    chosen = min(max(-(-AIM // epoch_steps), 1), MOST_EPOCHS)
    then = {} if state is None else state.get("config", {}).get("train", {})
    began = then.get("epoch_count")
    return replace(train, epoch_count=began if type(began) is int and began > 0 else chosen)
