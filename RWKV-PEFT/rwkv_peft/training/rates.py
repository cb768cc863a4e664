"""The learning rate that --lr_init auto chooses: Bone's by the model's width, another method's by its first step.

docs/learning_rates.md has the formulas, what they rest on, and where they mislead.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..adapters.methods import method_of
from ..config import STATE_LR, AdapterConfig, TrainConfig
from ..errors import UserError

ANCHOR = 0.08  # Bone's rate times the model's channels
FALL = 0.1  # the last rate over the first


class Rate(NamedTuple):
    """A learning rate, to two digits, and where it comes from."""

    value: float
    reason: str


def automatic_rate(adapter: AdapterConfig, n_embd: int) -> Rate:
    """The Rate of an adapter on a model of n_embd channels. Raises UserError where there is no rule for it."""
    method = method_of(adapter)
    if adapter.states_alone:
        return Rate(STATE_LR, "that of states")
    bone = ANCHOR / n_embd
    if method is None:
        raise UserError(
            "--lr_init auto has no rule for the model itself (--peft none), of whose rates nothing was measured here; "
            "give a number: others fine-tune models of some billion parameters at 1e-5"
        )
    step = method.first_step(adapter, n_embd)
    if step is None:
        raise UserError(
            f"--lr_init auto: how far {method.label} moves a weight depends on the weight, and there is no rule; give "
            f"a number, {bone:.1g} to {10 * bone:.1g} to begin with here, or ask rwkv-peft compare"
        )
    reason = f"{ANCHOR:g} / {n_embd} channels"
    if step != 1:
        reason = f"bone's {reason}, over {step:.2g}, {method.label}'s first step in the weight where bone's is 1"
    return Rate(float(f"{bone / step:.2g}"), reason)


def with_chosen_rates(train: TrainConfig, rate: float) -> TrainConfig:
    """A TrainConfig in which the rates that it leaves to be chosen follow from the first."""
    values: dict[str, Any] = {"lr_init": rate, "lr_final": float(f"{rate * FALL:.2g}")}
    return replace(train, **{name: values[name] for name in train.lr_chosen})


def with_first_rates(train: TrainConfig, state: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig that goes on from the state.json of a checkpoint: what was left to be chosen is what the run began
    with, whatever would be chosen now."""
    then = state.get("config", {}).get("train", {})
    values: dict[str, Any] = {
        name: float(then[name]) for name in train.lr_chosen if isinstance(then.get(name), (int, float))
    }
    return replace(train, **values)
