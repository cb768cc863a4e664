"""The files that a run writes, in bytes."""

import math
from typing import NamedTuple

from ...checkpoints.base import Base
from ...checkpoints.tensors import DTYPES
from ...cli.names import STATE
from ...config import TrainConfig
from ...models.state import time_state_shapes
from ...training.saving.checkpoints import KEPT
from ...training.saving.products import keeps_all, optimizer_size
from .parts import Estimate


class Written(NamedTuple):
    """Files of one kind: name says which, size is the bytes of each, copies the most that are there at once."""

    name: str
    size: int
    copies: int


def written(estimate: Estimate, base: Base | None = None) -> list[Written]:
    """The files of a run's folder. base is the model that the run starts from, or None. Sizes count tensors only."""
    config, counts = estimate.config, estimate.counts
    train, item = config.train, estimate.dtype.itemsize
    asked = DTYPES.get(train.save_dtype)
    parameters = counts.total - counts.own
    model = estimate.file if estimate.file and asked is None else parameters * (asked or estimate.dtype).itemsize
    checkpoints, all_told = checkpoint_count(train)
    checkpoint = optimizer_size(train.optim, counts.trains, counts.matrices)
    epochs = epoch_count(train)
    held = checkpoints - epochs if train.keep_checkpoints == 0 else checkpoints  # with trained tensors of their own
    if not config.adapter.whole_model:
        name, size = "adapter.safetensors, and one an epoch", (counts.trains + counts.constants) * item
    else:
        name, size = "rwkv.pth, and one an epoch", model
        if not keeps_all(config, base):  # then each checkpoint has weights of its own
            held, checkpoint = 0, checkpoint + parameters * item
    labelled = epochs + bool(train.val_data or train.val_split)  # the best; the newest is one of them,
    between = bool(train.save_every or train.save_minutes)  # unless it was saved between epochs
    files = [Written(name, size, labelled + between * max(1, held))]
    if STATE in config.adapter.train_parts:
        states = sum(map(math.prod, time_state_shapes(config.model).values())) * item
        files.append(Written("state.pth, and one an epoch", states, labelled + between))
    if train.merge_on_save:
        files.append(Written("merged.pth, and one an epoch", model, labelled + between))
    name = "checkpoints" if all_told else "checkpoints, or more"
    return [*files, Written(name, checkpoint, checkpoints)]


def checkpoint_count(train: TrainConfig) -> tuple[int, bool]:
    """(the most checkpoints at once, whether that is sure): those that are kept and the next, or all if all are kept.
    In that case there may be more: --save_minutes adds some, and so does --save_every in a pass over the data whose
    number of steps is unknown."""
    keep = KEPT if train.keep_checkpoints is None else train.keep_checkpoints
    if keep:
        return keep + 1, True
    every, steps = train.save_every, train.epoch_steps
    more = multiples(train.epoch_begin * steps, train.epoch_count * steps, every)
    return saved_epochs(train) + more, not train.save_minutes and bool(steps or not every)


def epoch_count(train: TrainConfig) -> int:
    """The number of epochs that have files at once."""
    saved, keep = saved_epochs(train), train.keep_checkpoints
    return min(saved, keep + 1) if keep else saved  # an old one goes when the next is there


def saved_epochs(train: TrainConfig) -> int:
    """The number of epochs that are saved, the last included."""
    first, last, every = train.epoch_begin, train.epoch_count, train.epoch_save
    return multiples(first, last, every) + bool(last > first and (not every or last % every))


def multiples(first: int, last: int, step: int) -> int:
    """The number of multiples of `step` above `first` and up to `last`; none of 0."""
    return last // step - first // step if step and last > first else 0
