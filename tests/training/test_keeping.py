"""Keeping a run's saves: the newest stays whole wherever the removal of older ones is broken off; and saving by the
clock."""

import errno
import itertools
import os
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import TrainConfig
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.engine.callbacks import RunCallback
from rwkv_peft.training.saving.checkpoints import discard_old, list_checkpoints, telling_refusals, write_state
from rwkv_peft.training.step.plan import Plan

FILES = ("adapter.safetensors", "state.json", "optimizer/rank-00000.safetensors")
CHANGES = ("os.rename", "os.remove", "os.rmdir")
BY_EPOCH = [f"{kind}-epoch-{epoch}.{end}" for kind, end in (("adapter", "safetensors"), ("merged", "pth"))
            for epoch in (2, 9, 10)]  # fmt: skip
OTHERS = ["adapter.safetensors", "adapter-best.safetensors", "state.pth", "my-adapter-epoch-1.safetensors"]


def a_run(folder, steps=(2, 9, 10)):
    """A folder as a run leaves it, with checkpoints after so many steps of one sample."""
    for step in steps:
        for name in FILES:
            file = folder / "checkpoints" / f"step-{step:08d}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_state(file, {"samples_seen": step})
    for name in (*BY_EPOCH, *OTHERS):
        (folder / name).touch()
    return folder


def found(folder):
    """(the steps of a folder's checkpoints, the names of its other files)."""
    steps = [int(path.name[5:]) for path in list_checkpoints(folder)]
    return steps, {path.name for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("keep, steps, epochs", [
    (None, [9, 10], {2, 9, 10}), (0, [2, 9, 10], {2, 9, 10}), (1, [10], {10}), (2, [9, 10], {9, 10}),
    (5, [2, 9, 10], {2, 9, 10}),
])  # fmt: skip
def test_the_newest_stay(tmp_path, keep, steps, epochs):
    folder = a_run(tmp_path)
    discard_old(folder, keep)
    kept = {name for name in BY_EPOCH if int(name.split("-")[2].split(".")[0]) in epochs}
    assert found(folder) == (steps, kept | set(OTHERS))


@pytest.mark.parametrize("number, kind", [(errno.ENOSPC, UserError), (errno.EACCES, UserError),
                                          (errno.ECONNRESET, OSError)])  # fmt: skip
def test_a_disk_that_refuses_is_told_with_what_is_left(tmp_path, number, kind):
    words = f"{os.strerror(number)}.*the last checkpoint is .*step-00000010" if kind is UserError else "reset"
    with pytest.raises(kind, match=f"(?i){words}"), telling_refusals(a_run(tmp_path)):
        raise OSError(number, os.strerror(number))


def test_a_folder_that_is_deleted_while_a_run_goes_on_is_told(tmp_path):
    folder = tmp_path / "run"
    (folder / "tensorboard").mkdir(parents=True)
    words = "cannot write in .*run: no such file.*begin the run anew"
    with pytest.raises(UserError, match=words), telling_refusals(folder):
        shutil.rmtree(folder)
        open(folder / "tensorboard" / "events", "ab")
    with pytest.raises(FileNotFoundError), telling_refusals(tmp_path):  # a fault of ours
        open(tmp_path / "absent")


@pytest.mark.parametrize("error, printed", [(OSError(errno.ENOSPC, "full"), 0), (OSError("other"), 1)])
def test_a_loggers_thread_that_a_disk_refuses_prints_no_traceback(tmp_path, monkeypatch, error, printed):
    def write():
        raise error

    seen = []
    monkeypatch.setattr("threading.excepthook", lambda thread: seen.append(thread.exc_value))
    with telling_refusals(tmp_path):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert seen == [error] * printed


def killed(folder, operation):
    """Let a process that keeps only one save kill itself before its `operation`-th change -> True if it got so far."""
    process = os.fork()
    if process == 0:
        count = itertools.count(1)

        def look(event, arguments):
            if event in CHANGES and next(count) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        discard_old(folder, 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_any_file_leaves_whole_checkpoints_and_the_next_save_the_rest(tmp_path):
    for operation in itertools.count(1):
        folder = a_run(tmp_path / str(operation))
        if not killed(folder, operation):
            break
        for checkpoint in list_checkpoints(folder):
            assert all((checkpoint / name).exists() for name in FILES)
        steps, files = found(folder)
        assert steps[-1] == 10 and "adapter-epoch-10.safetensors" in files
        discard_old(folder, 1)
        assert found(folder) == ([10], {"adapter-epoch-10.safetensors", "merged-epoch-10.pth", *OTHERS})
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000010"]
    assert operation > 2 * (2 + len(FILES))  # of two checkpoints: the name, each file, the two folders


@pytest.mark.parametrize("first", [True, False])
def test_the_first_rank_asks_for_a_save_by_a_clock_that_nobody_sets(monkeypatch, first):
    now, saves = [100.0], []
    monkeypatch.setattr(
        "rwkv_peft.training.engine.callbacks.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: 0.0)
    )
    saver = SimpleNamespace(save=lambda trainer, lit, done, epoch: saves.append((done, epoch)))
    config = SimpleNamespace(train=TrainConfig(save_minutes=0.5), objective=NextToken())
    plan, ends = Plan(1, 100, 100, 0, 0), lambda done: False
    callback = RunCallback(SimpleNamespace(config=config, saver=saver, plan=plan, ends=ends))
    trainer, lit = SimpleNamespace(is_global_zero=first), SimpleNamespace(step=0, stopping=False)
    callback.saved = now[0]
    for step, seconds in enumerate((20, 9, 2, 20, 20)):
        now[0] += seconds
        callback.on_train_batch_start(trainer, lit, None, 1)
        lit.saving = lit.save_requested  # which the ranks agree on
        callback.save(trainer, lit, step + 1)
    assert saves == ([(3, None), (5, None)] if first else [])
