"""What a run takes on the disk, by its plan: files, their copies, and what stays."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest

from rwkv_peft.tools.plan.memory import OPTIMIZER, checkpoint_count, saved_epochs, written
from tools.plan.estimates import estimate


def test_files_are_counted_with_their_copies():
    told = estimate("--epoch_count", "6", "--epoch_save", "2", "--val_data", "x", "--merge_on_save")
    adapter, merged, checkpoints = written(told)
    assert adapter.copies == merged.copies == 3 + 1  # three epochs, of which the newest is one, and the best
    assert adapter.size == 2 * told.counts.own and merged.size == 2 * (told.counts.total - told.counts.own)
    assert checkpoints.size == OPTIMIZER["adamw"] * told.counts.trains


def test_what_is_saved_is_counted_without_a_list_of_it():
    """The count is that of a list, and works for runs whose list would not fit into memory."""
    for first, last, save, steps, every in product(range(3), range(7), range(4), range(4), range(6)):
        train = SimpleNamespace(epoch_begin=first, epoch_count=last, epoch_save=save, epoch_steps=steps)
        train.save_every, train.save_minutes, train.keep_checkpoints = every, 0.0, 0
        epochs = [n for n in range(first + 1, last + 1) if n == last or save and n % save == 0]
        more = {step for step in range(first * steps + 1, last * steps + 1) if every and step % every == 0}
        assert saved_epochs(train) == len(epochs)
        assert checkpoint_count(train)[0] == len(epochs) + len(more)
    assert checkpoint_count(replace(estimate().config.train, epoch_count=1 << 48, keep_checkpoints=0))[0] == 1 << 48


def test_tuned_states_have_a_file_of_their_own():
    told = estimate("--train_parts", "state")
    adapter, states, _ = written(told)
    assert states.name.startswith("state.pth") and states.size == 2 * (told.counts.trains - estimate().counts.trains)
    assert states.copies == adapter.copies


def test_what_is_to_be_retained_chooses_no_best_adapter():
    assert written(estimate("--retain_data", "x")) == written(estimate()) != written(estimate("--val_data", "x"))


@pytest.mark.parametrize(
    "flags, adapters, checkpoints, name",
    [
        ("", 6, 3, "checkpoints"),  # two stay while the third is written
        ("--keep_checkpoints 1", 2, 2, "checkpoints"),
        ("--keep_checkpoints 0", 6, 6, "checkpoints"),
        ("--keep_checkpoints 0 --epoch_save 0 --epoch_steps 10 --save_every 7", 9, 9, "checkpoints"),  # 7, … 56, and 60
        ("--save_every 7", 6 + 3, 3, "checkpoints"),  # no checkpoint need be of an epoch
        ("--keep_checkpoints 0 --save_every 4", 7, 6, "checkpoints, or more"),
        ("--keep_checkpoints 0 --save_minutes 5", 7, 6, "checkpoints, or more"),
    ],
)
def test_what_stays_of_a_run_is_counted(flags, adapters, checkpoints, name):
    files = written(estimate("--epoch_count", "6", *flags.split()))
    assert [file.copies for file in files] == [adapters, checkpoints] and files[-1].name == name
