"""How many epochs a run takes if the flags leave it open: rows of answers are read until they are learned."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import AIM, MOST_EPOCHS, TrainConfig


def with_chosen_epochs(train: TrainConfig, epoch_steps: int, state: Mapping[str, Any] | None) -> TrainConfig:
    """A TrainConfig with the number of epochs for steps of so many an epoch, if it leaves that to be chosen; one that
    goes on from the state.json of a checkpoint has what the run began with."""
    if not train.epochs_chosen:
        return train
    chosen = min(max(-(-AIM // epoch_steps), 1), MOST_EPOCHS)
    then = {} if state is None else state.get("config", {}).get("train", {})
    began = then.get("epoch_count")
    return replace(train, epoch_count=began if type(began) is int and began > 0 else chosen)
