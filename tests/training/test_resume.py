"""Runs that stop and are resumed, through the command that a user types: the same bits, or a refusal with a message.

Each run is a process of its own, because the engine keeps global state.
"""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig, to_json
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.training.saving.checkpoints import write_state
from rwkv_peft.training.saving.resume import read_run_state
from training.held import held
from training.runs import finish, metrics, rewound, start, wait_for_steps, wait_for_words

LONG = (
    *"--precision bf16 --micro_bsz 1 --epoch_steps 20 --epoch_count 3".split(),
    *"--strategy deepspeed_stage_2 --train_parts ln".split(),
)


@pytest.fixture(scope="module")
def unbroken(files, train):
    train("unbroken", *LONG)
    return files / "unbroken"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_resumes_bitwise(files, command, train, unbroken, number, code):
    name, hold = number.name, files / "hold"
    process = start(held(command(name, *LONG), hold, 25))
    wait_for_steps(files, name, 25, process)
    process.send_signal(number)
    if number != signal.SIGKILL:
        wait_for_words("stopping after this step", process)
    hold.unlink()
    out, _ = finish(process, code)
    done = len(metrics(files, name))
    assert done == (25 if number == signal.SIGKILL else 26)
    if number != signal.SIGKILL:
        assert "--resume" in out and (files / name / "adapter.safetensors").exists()
    out, _ = train(name, *LONG, "--resume")
    assert f"resuming after step {done if number != signal.SIGKILL else 20 * (done // 20)}" in out
    keys = ("step", "loss", "lr", "grad_norm")
    mine, theirs = ([[line[key] for key in keys] for line in metrics(files, run)] for run in (name, "unbroken"))
    assert mine == theirs
    expected = load_file(unbroken / "adapter.safetensors")
    assert all(
        torch.equal(tensor, expected[key]) for key, tensor in load_file(files / name / "adapter.safetensors").items()
    )


@pytest.mark.parametrize("strategy", ["3", "3_offload"])
def test_a_run_under_any_strategy_resumes_bitwise(files, train, strategy, quick_compiler):
    flags = ("--strategy", f"deepspeed_stage_{strategy}", "--accumulate_grad_batches", "2", "--lr_schedule", "constant")
    train(f"whole-{strategy}", *flags)
    whole, parts = files / f"whole-{strategy}", rewound(files / f"whole-{strategy}", f"parts-{strategy}")
    train(parts.name, *flags, "--resume")
    assert (whole / "adapter.safetensors").read_bytes() == (parts / "adapter.safetensors").read_bytes()


def test_links_in_a_runs_folder_lead_to_another_disk(files, train):
    """A usual way to a larger one: a run begins and goes on there as in a plain folder, and the links stay."""
    disk, folder, flags = files / "disk", files / "linked", ("--epoch_steps", "2")
    folder.mkdir()
    for name in ("checkpoints", "tensorboard"):
        (disk / name).mkdir(parents=True)
        (folder / name).symlink_to(disk / name)
    (folder / "metrics.jsonl").symlink_to(disk / "metrics.jsonl")  # which is not there yet
    train(folder.name, *flags)
    shutil.rmtree(disk / "checkpoints" / "step-00000004")
    (folder / "adapter.safetensors").unlink()
    assert "resuming after step 2" in train(folder.name, *flags, "--resume")[0]
    assert sorted(path.name for path in (disk / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000004"]
    assert len((disk / "metrics.jsonl").read_text().splitlines()) == 4 and any((disk / "tensorboard").iterdir())
    assert all((folder / name).is_symlink() for name in ("checkpoints", "tensorboard", "metrics.jsonl"))


# trains as train.py does, and gets a signal while its log is closed
CLOSING = """
import os

from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rwkv_peft.cli.commands import run

close = EventFileWriter.close

def told(self):
    close(self)
    os.kill(os.getpid(), {number:d})

EventFileWriter.close = told
run("train")
"""


def test_a_terminal_that_goes_away_tells_more_than_once_and_the_run_saves(files, command):
    python, _, *argv = command("hung-up", "--epoch_steps", "100000")
    script = files / "closing.py"
    script.write_text(CLOSING.format(number=signal.SIGHUP))
    process = start([python, str(script), *argv])
    wait_for_steps(files, "hung-up", 5, process)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    finish(process, 128 + signal.SIGHUP)
    assert any((files / "hung-up" / "checkpoints").glob("step-*"))


def test_a_signal_after_the_last_step_does_not_end_a_run_before_its_picture(files, command):
    python, _, *argv = command("late", "--epoch_steps", "2", "--epoch_count", "1")
    script = files / "late.py"
    script.write_text(CLOSING.format(number=signal.SIGTERM))
    out, _ = finish(start([python, str(script), *argv]))
    assert "stopping" not in out and (files / "late" / "loss.png").exists()


def test_a_second_sigterm_has_its_exit_code(files, command):
    process = start(held(command("twice"), files / "hold", 5))
    wait_for_steps(files, "twice", 5, process)
    process.send_signal(signal.SIGTERM)
    wait_for_words("again to stop at once", process)
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)


def test_resume_refuses_ranks_that_do_not_divide_a_step_and_a_finished_run(train, unbroken):
    _, err = train("unbroken", *LONG, "--resume", "--devices", "2", code=2)
    assert (
        "a step has 1 sample in the run in" in err
        and "and 2 ranks of" in err
        and "--fresh_optimizer" in err
        and "Traceback" not in err
    )
    _, err = train("unbroken", *LONG, "--resume", "--precision", "fp32", code=2)
    assert "has precision bf16, this command fp32" in err and "--fresh_optimizer" in err
    _, err = train("unbroken", *LONG, "--resume", code=2)
    assert "complete" in err
    _, err = train("unbroken", *LONG, code=2)
    assert "already holds a run" in err
    (unbroken / "loss.png").unlink()  # as a run leaves it that was killed after its last save
    out, _ = train("unbroken", *LONG, "--resume", "auto")
    assert "is complete" in out and (unbroken / "loss.png").exists()


def test_resume_refuses_other_data_and_a_checkpoint_with_pieces_missing(files, train, unbroken):
    more = (*LONG, "--epoch_count", "4", "--resume")
    _, err = train("unbroken", *more, "--ctx_len", "32", "--random_seed", "7", code=2)
    assert "has data {'ctx_len': 24, 'seed': 42," in err and "this command {'ctx_len': 32, 'seed': 7," in err
    with ShardWriter(files / "other", vocab_size=80) as writer:
        for start in range(40):
            writer.add([1 + (start + 11 * i) % 79 for i in range(50 + start)] + [0])
    _, err = train("unbroken", *more, "--data_file", str(files / "other"), code=2)
    assert "has data whose tokens and " in err and "files are others than this command's; give" in err
    for end in (".bin", ".idx"):
        shutil.copy(files / f"data{end}", files / f"masked{end}")
    (files / "masked.mask").write_bytes(bytes([0, 1]) * ((files / "masked.bin").stat().st_size // 4))
    _, err = train("unbroken", *more, "--data_file", str(files / "masked"), code=2)
    assert "data whose tokens and loss mask and files are others than this command's; give" in err
    shutil.copytree(unbroken, files / "damaged")
    optimizer = next((files / "damaged" / "checkpoints" / "step-00000060").rglob("rank-*"))
    whole = optimizer.read_bytes()
    for content, what in (
        (whole[:1000], "is missing or not of the"),
        (whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], "differs from the file that was saved: its checksum"),
    ):
        optimizer.write_bytes(content)
        _, err = train("damaged", *more, code=2)
        assert f"{optimizer.name} {what}" in err and "--fresh_optimizer" in err and "Traceback" not in err


def test_another_number_of_devices_goes_on_at_the_next_sample(files, train):
    """In the order of rows that share batches, although each is alone in its batch now."""
    name, flags = "moved", ("--precision", "fp32", "--dataload", "pad")
    train(name, *flags, "--micro_bsz", "3", "--epoch_count", "1")
    train(name, *flags, "--micro_bsz", "1", "--devices", "2", "--resume", "--fresh_optimizer")
    lines = metrics(files, name)
    assert [line["samples"] for line in lines] == [3, 6, 9, 12, 14, 16]
    assert [line["step"] for line in lines] == [0, 2, 3, 5, 6, 7]  # as those of a step that takes 2
    state = json.loads((files / name / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["samples_seen"] == 16
    assert lines[4]["loss"] < lines[0]["loss"]


def test_larger_steps_forget_nothing_of_those_before(files, train):
    """Neither the metrics of smaller steps, though they have more lines, nor the best adapter and its loss."""
    flags = ("--precision", "fp32", "--val_data", str(files / "data"), "--val_every", "2", "--micro_bsz")
    train("larger", *flags, "1", "--epoch_count", "2")
    before, best = metrics(files, "larger"), (files / "larger" / "adapter-best.safetensors").read_bytes()
    worse = ("--lr_init", "1", "--lr_final", "1", "--epoch_count", "1", "--warmup_steps", "0")
    out, _ = train("larger", *flags, "4", *worse, "--resume", "--fresh_optimizer")  # at its third of 4 steps
    lines = metrics(files, "larger")
    assert [line["step"] for line in lines] == [0, 0, 0, 0, 0, 0, 0, 1, 2, 3]
    assert [line | {"step": None} for line in lines[:8]] == [line | {"step": None} for line in before]
    lowest = min(line["val_loss"] for line in before if "val_loss" in line)
    assert lines[-1]["val_loss"] > lowest and f"lowest loss {lowest:.4f}" in out
    assert (files / "larger" / "adapter-best.safetensors").read_bytes() == best


def test_the_lowest_loss_is_that_on_the_data_of_now(files, train):
    """With other validation data, earlier losses do not count, nor does the patience that they have used up."""
    with ShardWriter(files / "held-out", vocab_size=80) as writer:
        writer.add([79 - i % 79 for i in range(60)])
    rates = ("--lr_init", "0", "--lr_final", "0", "--warmup_steps", "0", "--precision", "fp32")
    flags = ("--val_every", "1", "--early_stop", "2", *rates, "--val_data")
    train("validated", *flags, str(files / "data"))
    out, _ = train("validated", *flags, str(files / "held-out"), "--resume")
    lines = metrics(files, "validated")
    best = files / "validated" / "adapter-best.safetensors"
    assert best.exists() and len(lines) == 6
    assert f"lowest loss {lines[3]['val_loss']:.4f}, {best}; stopped after 2 validations" in out
    again = ("--early_stop", "4", "--epoch_count", "3", "--resume")  # which knows of both data sets
    out, _ = train("validated", *flags, str(files / "held-out"), *again)
    assert lines[0]["val_loss"] < lines[3]["val_loss"] and len(metrics(files, "validated")) == 8
    assert f"lowest loss {lines[3]['val_loss']:.4f}, {best}; stopped after 4 validations" in out


def test_larger_steps_count_from_their_own_checkpoint(tmp_path):
    from rwkv_peft.training.saving.checkpoints import find_checkpoint

    for step, seen in ((12, 12), (4, 16)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_state(folder / "state.json", {"samples_seen": seen})
    assert find_checkpoint(tmp_path).name == "step-00000004"


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"samples_seen": 1}'])
def test_a_damaged_state_is_named(tmp_path, text):
    from rwkv_peft.training.saving.checkpoints import find_checkpoint

    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read: .* delete"):
        read_run_state(find_checkpoint(tmp_path), {})


def test_a_line_of_metrics_that_was_cut_off_does_not_hinder_resuming(tmp_path):
    from rwkv_peft.training.saving.resume import Lowest, forget_rest, history
    from rwkv_peft.training.step.plan import Plan

    path = tmp_path / "metrics.jsonl"
    whole = [
        json.dumps({"step": step, "loss": 0.1, "val_loss": 3.5 - step, "samples": 4 * step + 4}) + "\n"
        for step in range(3)
    ]
    path.write_text("".join(whole) + '{"step": 3, "lo')
    plan = Plan(step_samples=4, epoch_steps=9, total_steps=9, first_step=2, first_sample=8)
    assert Lowest(history(path, plan)).loss == 2.5
    forget_rest(path, plan)
    assert path.read_text() == "".join(whole[:2])


SAVED = {"samples_seen": 1, "trained": [], "retained": "", "validated_from": 0, "validation": ""}


def test_a_checkpoint_that_does_not_know_a_setting_has_its_default(tmp_path):
    from dataclasses import asdict

    known = {name: value for name, value in asdict(AdapterConfig(rank=16)).items() if name != "init"}
    machine = {"strategy": "deepspeed_stage_1", "world_size": 1, "precision": "bf16"}
    state = {"adapter": known, "base": "abc", "files": {}, **SAVED, **machine}
    state |= {"objective": "next_token", "data": {"ctx_len": 16, "counted": "def"}}
    state |= {"retained": "", "validated_from": 0, "validation": ""}
    write_state(tmp_path / "state.json", state)
    now = {"adapter": asdict(AdapterConfig(rank=16)), "base": "abc", "objective": "next_token", "teacher": ""}
    now |= {"optim": "adamw", "data": {"ctx_len": 16, "counted": "def"}}
    assert read_run_state(tmp_path, now, True)["base"] == "abc"
    data = now["data"] | {"sft_think": ""}
    assert read_run_state(tmp_path, now | {"data": data}, True)["data"] == data
    with pytest.raises(UserError, match="has data {'sft_think': ''}, this command {'sft_think': 'on'}"):
        read_run_state(tmp_path, now | {"data": data | {"sft_think": "on"}}, True)
    other = asdict(AdapterConfig(rank=16, init="init_pissa.pth"))
    with pytest.raises(UserError, match="has adapter {'init': ''}, .* {'init': 'init_pissa.pth'}; give the"):
        read_run_state(tmp_path, now | {"adapter": other}, True)


def test_a_setting_that_one_of_the_commands_does_not_have_is_named(tmp_path):
    same = {"adapter": {}, "base": "abc", "precision": "bf16", "optim": "adamw", "objective": "dpo", "teacher": ""}
    fixed = {"ctx_len": 16, "counted": "def"}
    drawn = fixed | {"val_seed": 5}
    then = same | SAVED | {"files": {}, "data": drawn}
    write_state(tmp_path / "state.json", then)
    with pytest.raises(UserError, match="^--resume: .* is of 0.2.0 or before, .* add --fresh_optimizer"):
        read_run_state(tmp_path, same | {"adapter": {}, "data": fixed})
    (tmp_path / "optimizer").mkdir()
    now = same | {"adapter": json.loads(to_json(AdapterConfig())), "data": fixed}
    with pytest.raises(UserError, match="has data {'val_seed': 5}, this command {'val_seed': None}"):
        read_run_state(tmp_path, now)
    write_state(tmp_path / "state.json", then | {"data": fixed})
    with pytest.raises(UserError, match="has data {'val_seed': None}, this command {'val_seed': 5}"):
        read_run_state(tmp_path, now | {"data": drawn})
