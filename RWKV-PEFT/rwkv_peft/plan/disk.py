"""The files that a run writes, in bytes."""

import math
from typing import NamedTuple

from ..config import TrainConfig
from ..files.base import Base
from ..files.pth_writer import DTYPES
from ..models.state import time_state_shapes
from ..names import STATE
from ..training.saving.checkpoints import KEPT
from ..training.saving.products import keeps_all, optimizer_size
from .parts import Estimate


class Written(NamedTuple):
    """Files of one kind: name says which, size is the bytes of each, copies the number of files at once, names the
    number of names that they have at once; on a disk without hard links each name is a file."""

    name: str
    size: int
    copies: int
    names: int


def written(estimate: Estimate, base: Base | None = None) -> list[Written]:
    """The files of a run's folder. base is the model that the run starts from, or None. Sizes count tensors only;
    headers add some kilobytes."""
    config, counts = estimate.config, estimate.counts
    train, item = config.train, estimate.dtype.itemsize
    asked = DTYPES.get(train.save_dtype)
    parameters = counts.total - counts.own
    model = estimate.file if estimate.file and asked is None else parameters * (asked or estimate.dtype).itemsize
    checkpoints, all_told = checkpoint_count(train)
    checkpoint = optimizer_size(train.optim, counts.trains, counts.matrices)
    labels, held = label_count(train), checkpoints
    if not config.adapter.whole_model:
        name, size = "adapter.safetensors, and one an epoch", (counts.trains + counts.constants) * item
    else:
        name, size = "rwkv.pth, and one an epoch", model
        if not keeps_all(config, base):  # then each checkpoint has weights of its own
            held, checkpoint = 0, checkpoint + parameters * item
    files = [Written(name, size, file_count(train, held), labels + held)]
    if STATE in config.adapter.train_parts:
        states = sum(map(math.prod, time_state_shapes(config.model).values())) * item
        files.append(Written("state.pth, and one an epoch", states, file_count(train, 0), labels))
    if train.merge_on_save:
        files.append(Written("merged.pth, and one an epoch", model, file_count(train, 0), labels))
    name = "checkpoints" if all_told else "checkpoints, or more"
    return [*files, Written(name, checkpoint, checkpoints, checkpoints)]


def checkpoint_count(train: TrainConfig) -> tuple[int, bool]:
    """(number of checkpoints at once, whether that is exact): those that are kept and the next, or all if all are kept.
    In that case there may be more: --save_minutes adds some, and so does --save_every in a pass over the data whose
    number of steps is unknown."""
    keep = KEPT if train.keep_checkpoints is None else train.keep_checkpoints
    if keep:
        return keep + 1, True
    saved, every, steps = saved_epochs(train), train.save_every, train.epoch_steps
    if every and steps:
        first, last = train.epoch_begin * steps, train.epoch_count * steps
        ends = math.lcm(train.epoch_save * steps, every)  # of epochs that are saved anyway
        saved += multiples(first, last, every) - multiples(first, last, ends)
        saved -= bool(last > first and last % every == 0 and (not ends or last % ends))  # and of the last epoch
    return saved, not train.save_minutes and bool(steps or not every)


def label_count(train: TrainConfig) -> int:
    """The number of names of the trained tensors in a run's folder: the newest, one a saved epoch, the best."""
    return 1 + epoch_count(train) + best_count(train)


def file_count(train: TrainConfig, held: int) -> int:
    """The number of files that have the names of label_count and `held` more in checkpoints: one a saved epoch, the
    best, and those of saves between epochs. The newest is one of them."""
    between = 0
    if train.save_every or train.save_minutes:
        of_epochs = epoch_count(train) if train.keep_checkpoints == 0 else 0
        between = max(1, held - of_epochs)
    return epoch_count(train) + best_count(train) + between


def epoch_count(train: TrainConfig) -> int:
    """The number of epochs that have files at once."""
    saved, keep = saved_epochs(train), train.keep_checkpoints
    return min(saved, keep + 1) if keep else saved  # an old one goes when the next is there


def best_count(train: TrainConfig) -> int:
    """1 if the run validates and so writes its best, else 0."""
    return int(bool(train.val_data or train.val_split))


def saved_epochs(train: TrainConfig) -> int:
    """The number of epochs that are saved, the last included."""
    first, last, every = train.epoch_begin, train.epoch_count, train.epoch_save
    return multiples(first, last, every) + bool(last > first and (not every or last % every))


def multiples(first: int, last: int, step: int) -> int:
    """The number of multiples of `step` above `first` and up to `last`; none of 0."""
    return last // step - first // step if step and last > first else 0
