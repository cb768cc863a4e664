"""A run reports what a disk refuses, and files that exist there stay."""

import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.checkpoints.atomic import CannotWrite
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.training.saving import saver
from rwkv_peft.training.saving.checkpoints import list_checkpoints, telling_refusals
from training.held import held
from training.runs import finish, start, wait_for_steps


def test_a_picture_that_cannot_be_drawn_is_told_and_the_run_is_complete(files, command):
    argv, hold = command("no-picture"), files / "hold"
    process = start(held(argv, hold, 1))
    wait_for_steps(files, "no-picture", 1, process)
    (files / "no-picture" / "loss.png").mkdir()  # while the run goes on: one that stood there is told before it
    hold.unlink()
    out, err = finish(process)
    assert "finished" in out and re.search(r"^note: .*loss.png is a folder.*--resume auto draws it", err, re.M), err
    (files / "no-picture" / "loss.png").rmdir()
    finish(start([*argv, "--resume", "auto"]))
    assert (files / "no-picture" / "loss.png").stat().st_size


@pytest.fixture
def saves(tmp_path):
    """The Saver of a run that has saved after four steps."""
    earlier = tmp_path / "checkpoints" / "step-00000004"
    earlier.mkdir(parents=True)
    (earlier / "state.json").write_text('{"samples_seen": 4}')
    return saver.Saver(tmp_path, SimpleNamespace(adapter=AdapterConfig()), None, {"world_size": 1})


REFUSED = r"refused the data .is it full.*adapter.safetensors; the last checkpoint is .*step-00000004"
FAULT = "[gloo/transport/tcp/pair.cc] Connection closed by peer"


@pytest.mark.parametrize(
    "reason, kind, words",
    [("unexpected pos 348864 vs 348752", UserError, REFUSED), (FAULT, RuntimeError, "closed by peer")],
)
def test_what_keeps_a_checkpoint_from_being_saved_is_told_and_leaves_the_earlier_ones(
    tmp_path, monkeypatch, saves, reason, kind, words
):
    def refuse(*args, **settings):
        raise RuntimeError(reason)

    monkeypatch.setattr(saver, "write_pieces", refuse)
    monkeypatch.setattr(saver, "steps_taken", lambda optimizer: 8)
    trainer = SimpleNamespace(is_global_zero=True, global_rank=0, optimizers=[SimpleNamespace(optimizer=None)])
    trainer.strategy = SimpleNamespace(barrier=lambda: None)
    with pytest.raises(kind, match=words), telling_refusals(tmp_path):
        saves.save_checkpoint(trainer, SimpleNamespace(model=torch.nn.Linear(2, 2)), 8)
    (earlier,) = list_checkpoints(tmp_path)
    assert earlier.name == "step-00000004"
    if kind is UserError:
        assert os.listdir(earlier.parent) == [earlier.name]


FULL = """
import errno
from rwkv_peft.cli.commands import run
from rwkv_peft.training.saving import saver

def full(path, state):
    if state["step"] >= {step}:
        path.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    whole(path, state)

whole, saver.write_state = saver.write_state, full
run("train")
"""


FULL_AT_ONCE = """
import errno
from rwkv_peft.cli.commands import run
from rwkv_peft.training.saving import loggers

def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device", "events.out.tfevents")

loggers.make_loggers = full
run("train")
"""


def test_a_disk_that_is_full_for_the_first_file_of_tensorboard_is_told(files, command):
    (files / "full-at-once.py").write_text(FULL_AT_ONCE)
    argv = command("full-at-once")
    _, err = finish(start([argv[0], str(files / "full-at-once.py"), *argv[2:]]), 2)
    run = files / "full-at-once"
    assert err.startswith(f"error: cannot write in {run}: no space left on device; ") and err.count("\n") == 1


def test_a_file_in_the_place_of_the_runs_folder_is_told(files, command):
    process = start(command("replaced", "--epoch_steps", "100000"))
    run = files / "replaced"
    wait_for_steps(files, "replaced", 1, process)
    run.rename(files / "moved")
    run.touch()
    process.send_signal(signal.SIGTERM)  # and so it saves
    _, err = finish(process, 2)
    assert "Traceback" not in err and "replaced" in err, err


@pytest.mark.parametrize("step", [4, 8])
def test_a_disk_that_is_full_at_the_last_file_of_a_save_leaves_what_was_promised(files, command, step):
    name, script = f"full-at-{step}", files / f"full-at-{step}.py"
    script.write_text(FULL.format(step=step))
    argv = command(name)
    _, err = finish(start([argv[0], str(script), *argv[2:]]), 2)
    run = files / name
    assert f"the disk is full; free some space or choose another disk; the trained tensors are in {run}" in err
    assert "nothing was changed" not in err and err.count("\n") == 1
    last = f"the last checkpoint is {run}/checkpoints/step-00000004"
    assert ("no checkpoint had been saved yet" if step == 4 else last) in err
    assert not list(run.rglob(".*"))
    trained = (run / "adapter.safetensors").read_bytes()
    if step == 4:
        _, err = finish(start([*argv, "--resume", "auto"]), 2)
        assert "already holds adapter" in err and "which a new run would overwrite" in err
    assert (run / "adapter.safetensors").read_bytes() == trained


def test_a_disk_that_is_full_for_trained_tensors_names_the_checkpoint(tmp_path, saves, monkeypatch):
    def refuse(tensors, labels):
        raise CannotWrite("cannot write adapter.safetensors: the disk is full; nothing was changed there")

    monkeypatch.setattr(saves.products, "write", refuse)
    monkeypatch.setattr(saves, "trained", lambda trainer, lit: {})
    words = "the disk is full; .*the last checkpoint is .*step-00000004; .*--resume goes on"
    with pytest.raises(UserError, match=words), telling_refusals(tmp_path):
        saves.save_tensors(SimpleNamespace(is_global_zero=True), None, [""])


def test_names_that_lead_nowhere_are_told_or_made(files, command):
    _, said = finish(start(command("x" * 300)), 2)
    assert re.fullmatch(r"error: \S+x{100,}…: file name too long; choose a shorter one\n", said), said
    (files / "link").symlink_to(files / "its folder")  # which is not there yet
    finish(start(command("link", "--epoch_steps", "1", "--epoch_count", "1")))
    assert (files / "its folder" / "adapter.safetensors").exists()


def test_a_disk_without_room_for_a_save_is_told_before_the_first_step(files, command, monkeypatch):
    from rwkv_peft.training.run import main

    monkeypatch.setattr("rwkv_peft.checkpoints.atomic.room_at", lambda path: 1000)
    with pytest.raises(UserError, match=r"--proj_dir \S+ needs [\d,]+ bytes for a save, and its disk has 1,000 free"):
        main(command("no-room")[2:])
    assert not (files / "no-room").exists()
