"""What a run writes, in bytes."""

from typing import NamedTuple

from ..config import TrainConfig
from ..files.dtypes import DTYPES
from ..training.keeping import KEPT
from ..training.room import checkpoint_size
from .parts import Estimate


class Written(NamedTuple):
    """Files that a run writes: what they are, how many, bytes of each."""

    name: str
    copies: int
    size: int


def written(estimate: Estimate) -> list[Written]:
    """The files of a run's folder. Sizes are those of the tensors; headers add some kilobytes."""
    config, counts = estimate.config, estimate.counts
    train, full = config.train, config.adapter.whole_model
    item = estimate.dtype.itemsize
    trained = (counts.trains + counts.constants) * item
    model = (counts.total - counts.own) * DTYPES.get(train.save_dtype, estimate.dtype).itemsize
    labels = label_count(train)
    files = [Written("rwkv.pth, and one an epoch", labels, model)] if full else []
    if not full:
        files.append(Written("adapter.safetensors, and one an epoch", labels, trained))
    if train.merge_on_save:
        files.append(Written("merged.pth, and one an epoch", labels, model))
    copies, all_told = checkpoint_count(train)
    name = "checkpoints" if all_told else "checkpoints, or more"
    files.append(Written(name, copies, checkpoint_size(counts.trains, item)))
    return files


def checkpoint_count(train: TrainConfig) -> tuple[int, bool]:
    """(how many checkpoints are there at once, whether that is all): those that stay and the next, or all that are
    saved, which the clock (--save_minutes) and a pass over the data of unknown length may make more."""
    keep = KEPT if train.keep_checkpoints is None else train.keep_checkpoints
    if keep:
        return keep + 1, True
    epochs = saved_epochs(train)
    first, last = train.epoch_begin * train.epoch_steps, train.epoch_count * train.epoch_steps
    steps = {epoch * train.epoch_steps for epoch in epochs} if train.epoch_steps else set()
    if train.save_every:
        steps |= {step for step in range(first + 1, last + 1) if step % train.save_every == 0}
    return max(len(epochs), len(steps)), not train.save_minutes and bool(train.epoch_steps or not train.save_every)


def label_count(train: TrainConfig) -> int:
    """How many files of trained tensors a run leaves: the newest, one an epoch that is saved, the best."""
    saved, keep = len(saved_epochs(train)), train.keep_checkpoints
    if keep:
        saved = min(saved, keep + 1)  # an old one goes when the next is there
    return 1 + saved + bool(train.val_data or train.val_split)


def saved_epochs(train: TrainConfig) -> list[int]:
    """The epochs that are saved, among them the last."""
    epochs = range(train.epoch_begin + 1, train.epoch_count + 1)
    return [n for n in epochs if n == train.epoch_count or (train.epoch_save and n % train.epoch_save == 0)]
