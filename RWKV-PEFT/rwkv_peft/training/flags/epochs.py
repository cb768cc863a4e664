"""Choose the number of epochs if the flags leave it open: few rows of answers are read often enough to be learned."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...config import AIM, MOST_EPOCHS, TrainConfig


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
