"""What a run writes, in bytes."""

from typing import NamedTuple

from ..config import TrainConfig
from ..files.dtypes import DTYPES
from ..training.saver import KEEP
from .parts import OPTIMIZER, Estimate


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
    files.append(Written("checkpoints", KEEP + 1, OPTIMIZER * counts.trains + counts.trains * item))
    return files


def label_count(train: TrainConfig) -> int:
    """How many files of trained tensors a run leaves: the newest, one an epoch that is saved, the best."""
    epochs = train.epoch_count - train.epoch_begin
    saved = epochs // train.epoch_save if train.epoch_save else 0
    return 1 + saved + bool(train.val_data or train.val_split)
