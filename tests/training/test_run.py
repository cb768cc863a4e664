"""train.py as a user runs it: ZeRO stages and ranks agree, a stopped run resumes bitwise, a diverged run says so.

Each case is a process of its own, because the engine keeps global state.
"""

import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.cpp_extension import _get_build_directory

from rwkv_peft.data.binidx import BinidxWriter
from rwkv_peft.errors import UserError
from rwkv_peft.files.base import open_base
from rwkv_peft.training.saved_files import record_of
from rwkv_peft.training.saver import read_run_state
from training.runs import ROOT, Planted, finish, metrics, start


@pytest.fixture(scope="module")
def one_process(train):
    """The run that the others are held against: stage 1, one process, four samples a step."""
    out, _ = train("one", "--precision", "fp32", "--micro_bsz", "4")
    return out


def test_a_run_leaves_what_it_says(files, one_process):
    folder = files / "one"
    for name in ("config.json", "metrics.jsonl", "loss.png", "adapter.safetensors", "adapter-epoch-1.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    assert any((folder / "tensorboard").iterdir())
    assert "trainable%" in one_process and "ETA" in one_process and "tokens/s" in one_process
    assert "(2 epochs of 4), 4 samples each" in one_process
    lines = metrics(files, "one")
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["lr"] == pytest.approx(1e-3)
    tensors = load_file(folder / "adapter.safetensors")
    assert set(tensors) == {
        f"blocks.{i}.{name}.bone"
        for i in range(2)
        for name in (
            "att.receptance",
            "att.key",
            "att.value",
            "att.gate",
            "att.output",
            "ffn.key",
            "ffn.receptance",
            "ffn.value",
        )
    }
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_one_is_no_plural_and_a_chosen_rate_is_told(train):
    few = ("--epoch_count", "1", "--epoch_steps", "1", "--micro_bsz", "1", "--target_modules", "att.key")
    out, _ = train("single", *few, "--lr_init", "auto")
    assert "steps     1 (1 epoch of 1), 1 sample each\n" in out
    assert "rate      0.0013 to 0.001 (--lr_init auto: 0.08 / 64 channels; docs/learning_rates.md)\n" in out


@pytest.mark.parametrize("delay", [0.1, 1.6])
def test_ctrl_c_before_the_first_step_is_one_line(command, delay):
    process = interrupt(command(f"early-{delay}", "--precision", "fp32"), "output ", delay)
    out, err = process.communicate(timeout=240)
    if "stopping after this step" in out or process.returncode == 0:
        return  # this machine had begun to train, and Ctrl-C saves
    assert process.returncode == 130
    assert err in ("interrupted\n", "interrupted; what was saved before is intact\n")


def test_ctrl_c_after_the_last_word_of_a_run_changes_nothing(command):
    process = interrupt(command("late", "--epoch_steps", "1", "--epoch_count", "1"), "finished ", 0)
    _, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")


def interrupt(argv, word, delay):
    """A command that gets a Ctrl-C so many seconds after it printed a line that begins with a word."""
    process = start(argv, cold=True)
    while not process.stdout.readline().startswith(word):
        assert process.poll() is None
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    return process


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_fits_into_80_columns_with_all_its_numbers(monkeypatch):
    from rwkv_peft.training.callbacks import Progress
    from rwkv_peft.training.run import Plan

    monkeypatch.setenv("COLUMNS", "81")  # tqdm leaves the last one free
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setattr(sys, "stdout", Terminal())
    progress = Progress(Plan(8, 123456, 123456, 0, 0))
    progress.bar.mininterval = 0
    progress.update("loss 10.1234, lr 1.0e-04, 123,456 tokens/s", 1)
    progress.close()
    frames = sys.stdout.getvalue().split("\r")
    assert all(len(frame.rstrip("\n")) <= 80 for frame in frames)
    assert any("| 1/123456, ETA " in frame and frame.rstrip().endswith("123,456 tokens/s") for frame in frames), frames


@pytest.mark.parametrize(
    "strategy, ranks, micro, accumulate",
    [("deepspeed_stage_2", 2, 2, 1), ("deepspeed_stage_3", 1, 2, 2), ("deepspeed_stage_3", 2, 1, 2)],
)
def test_stages_ranks_and_micro_batches_train_the_same(files, train, one_process, strategy, ranks, micro, accumulate):
    name = f"{strategy}-{ranks}-{micro}"
    train(
        name,
        "--precision",
        "fp32",
        "--strategy",
        strategy,
        "--devices",
        str(ranks),
        "--micro_bsz",
        str(micro),
        "--accumulate_grad_batches",
        str(accumulate),
        "--grad_cp",
        "1",
    )
    for mine, theirs in zip(metrics(files, name), metrics(files, "one")):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["tokens"] == theirs["tokens"]
    expected = load_file(files / "one" / "adapter.safetensors")
    for key, tensor in load_file(files / name / "adapter.safetensors").items():
        assert (tensor - expected[key]).norm() <= 2e-2 * expected[key].norm(), key


def test_a_step_in_which_no_token_counts_has_no_loss(files, train):
    with BinidxWriter(files / "half", vocab_size=80, mask=True) as writer:
        for answer in (1, 0):
            writer.add(list(range(20)), [answer] * 20)
    flags = ("--data_file", str(files / "half"), "--dataload", "only", "--data_shuffle", "0", "--epoch_steps", "2")
    out, _ = train("half", *flags, "--epoch_count", "1")
    first, second = metrics(files, "half")
    assert first["loss"] > 0 and second["loss"] is None
    assert "step 2/2, no token counts in the loss, lr" in out and (files / "half" / "loss.png").stat().st_size > 10_000


def test_offload_after_a_killed_build_and_compiled_blocks_train_the_same(files, train, one_process):
    (Path(_get_build_directory("cpu_adam", verbose=False)) / "lock").touch()  # what such a build leaves behind
    train("offload", "--precision", "fp32", "--strategy", "deepspeed_stage_2_offload", "--micro_bsz", "4", "--compile")
    for mine, theirs in zip(metrics(files, "offload"), metrics(files, "one")):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


LONG = (
    "--precision",
    "bf16",
    "--micro_bsz",
    "1",
    "--epoch_steps",
    "20",
    "--epoch_count",
    "3",
    "--strategy",
    "deepspeed_stage_2",
    "--train_parts",
    "ln",
)


@pytest.fixture(scope="module")
def unbroken(files, train):
    train("unbroken", *LONG)
    return files / "unbroken"


def wait_for_steps(files, name, steps, process):
    path = files / name / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_stopped_run_resumes_bitwise(files, command, train, unbroken, number, code):
    name = number.name
    process = start(command(name, *LONG))
    wait_for_steps(files, name, 25, process)
    process.send_signal(number)
    out, _ = finish(process, code)
    done = len(metrics(files, name))
    assert 25 <= done < 60
    if number != signal.SIGKILL:
        assert "--resume" in out and (files / name / "adapter.safetensors").exists()
    out, _ = train(name, *LONG, "--resume")
    assert f"resuming at step {done if number != signal.SIGKILL else 20 * (done // 20)}" in out
    keys = ("step", "loss", "lr", "grad_norm")
    mine, theirs = ([[line[key] for key in keys] for line in metrics(files, run)] for run in (name, "unbroken"))
    assert mine == theirs
    expected = load_file(unbroken / "adapter.safetensors")
    assert all(
        torch.equal(tensor, expected[key]) for key, tensor in load_file(files / name / "adapter.safetensors").items()
    )


def test_a_terminal_that_goes_away_tells_more_than_once_and_the_run_saves(files, command):
    process = start(command("hung-up", "--epoch_steps", "100000"))
    wait_for_steps(files, "hung-up", 5, process)
    for _ in range(3):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.02)
    finish(process, 128 + signal.SIGHUP)
    assert any((files / "hung-up" / "checkpoints").glob("step-*"))


def test_a_second_sigterm_has_its_exit_code(files, command):
    process = start(command("twice", "--epoch_steps", "100000"))
    wait_for_steps(files, "twice", 5, process)
    process.send_signal(signal.SIGTERM)
    while "again to stop at once" not in process.outputs[0].read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)


def test_a_picture_that_cannot_be_drawn_is_told_and_the_run_is_complete(files, command):
    argv = command("no-picture")
    (files / "no-picture" / "loss.png").mkdir(parents=True)
    out, err = finish(start(argv))
    assert "finished" in out and re.search(r"^note: .*loss.png is a folder.*--resume auto draws it", err, re.M), err
    (files / "no-picture" / "loss.png").rmdir()
    finish(start([*argv, "--resume", "auto"]))
    assert (files / "no-picture" / "loss.png").stat().st_size


def test_resume_refuses_another_number_of_ranks_and_a_finished_run(train, unbroken):
    _, err = train("unbroken", *LONG, "--resume", "--devices", "2", code=2)
    assert "world_size 1" in err and "--fresh_optimizer" in err and "Traceback" not in err
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
    with BinidxWriter(files / "other", vocab_size=80) as writer:
        for start in range(40):
            writer.add([1 + (start + 11 * i) % 79 for i in range(50 + start)] + [0])
    _, err = train("unbroken", *more, "--data_file", str(files / "other"), code=2)
    assert "has data {'content': " in err
    shutil.copytree(unbroken, files / "damaged")
    optimizer = next((files / "damaged" / "checkpoints" / "step-00000060").rglob("*optim_states.pt"))
    whole = optimizer.read_bytes()
    for content, what in (
        (whole[:1000], "is missing or not of the"),
        (whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], "is not what was saved: its checksum is another"),
    ):
        optimizer.write_bytes(content)
        _, err = train("damaged", *more, code=2)
        assert f"{optimizer.name} {what}" in err and "--fresh_optimizer" in err and "Traceback" not in err


def test_resuming_in_a_strangers_folder_runs_nothing_of_it(files, train, unbroken):
    shutil.copytree(unbroken, files / "strange")
    checkpoint = files / "strange" / "checkpoints" / "step-00000060"
    optimizer = next(checkpoint.rglob("*optim_states.pt"))
    torch.save(torch.load(optimizer, weights_only=False) | {"planted": Planted(files / "ran")}, optimizer)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][str(optimizer.relative_to(checkpoint))] = record_of(optimizer)
    (checkpoint / "state.json").write_text(json.dumps(state))
    _, err = train("strange", *LONG, "--epoch_count", "4", "--resume", code=2)
    assert f"{optimizer.name} holds code or objects besides tensors" in err and "Traceback" not in err
    assert not (files / "ran").exists()


@pytest.mark.parametrize("method", [(), ("--peft", "none", "--train_parts", "ln")])
def test_another_number_of_devices_goes_on_at_the_next_sample(files, train, method):
    name = "moved" + "-none" * bool(method)
    flags = ("--precision", "fp32", *method)
    train(name, *flags, "--micro_bsz", "3", "--epoch_count", "1")
    train(name, *flags, "--micro_bsz", "1", "--devices", "2", "--resume", "--fresh_optimizer")
    lines = metrics(files, name)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 6, 7]  # 12 samples were seen, and a step takes 2 now
    state = json.loads((files / name / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["samples_seen"] == 16
    assert lines[4]["loss"] < lines[0]["loss"]


def test_larger_steps_count_from_their_own_checkpoint(tmp_path):
    from rwkv_peft.training.checkpoints import find_checkpoint

    for step, seen in ((12, 12), (4, 16)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"samples_seen": seen}))
    assert find_checkpoint(tmp_path).name == "step-00000004"


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"samples_seen": 1}'])
def test_a_damaged_state_is_named(tmp_path, text):
    from rwkv_peft.training.checkpoints import find_checkpoint

    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read .* delete"):
        read_run_state(find_checkpoint(tmp_path), {})


def test_a_line_of_metrics_that_was_cut_off_does_not_hinder_resuming(tmp_path):
    from rwkv_peft.config import TrainConfig
    from rwkv_peft.training.callbacks import forget_from
    from rwkv_peft.training.validate import Validator

    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": 0.1, "val_loss": 3.5 - step}) + "\n" for step in range(3)]
    path.write_text("".join(whole) + '{"step": 3, "lo')
    validator = Validator([], 1, TrainConfig(val_every=1), None, None, None)
    validator.restore(path, 2)
    assert validator.best == 2.5
    forget_from(path, 2)
    assert path.read_text() == "".join(whole[:2])


@pytest.mark.parametrize(
    "reason, kind, words",
    [
        (
            "unexpected pos 348864 vs 348752",
            UserError,
            r"refused the data .is it full.*adapter.safetensors; the last checkpoint is .*step-00000004",
        ),
        ("[gloo/transport/tcp/pair.cc] Connection closed by peer", RuntimeError, "closed by peer"),
    ],
)
def test_what_keeps_a_checkpoint_from_being_saved_is_told_and_leaves_the_earlier_ones(tmp_path, reason, kind, words):
    from rwkv_peft.config import AdapterConfig
    from rwkv_peft.training.checkpoints import list_checkpoints
    from rwkv_peft.training.saver import Saver

    def refuse(*args, **settings):
        raise RuntimeError(reason)

    earlier = tmp_path / "checkpoints" / "step-00000004"
    earlier.mkdir(parents=True)
    (earlier / "state.json").write_text('{"samples_seen": 4}')
    strategy = SimpleNamespace(barrier=lambda: None, deepspeed_engine=SimpleNamespace(save_checkpoint=refuse))
    saver = Saver(tmp_path, SimpleNamespace(adapter=AdapterConfig()), None, {"world_size": 1})
    with pytest.raises(kind, match=words):
        saver.save_checkpoint(SimpleNamespace(is_global_zero=True, strategy=strategy), None, 8)
    assert list_checkpoints(tmp_path) == [earlier]
    if kind is UserError:
        assert os.listdir(earlier.parent) == [earlier.name]


def test_tensors_of_a_run_that_could_not_save_a_checkpoint_are_not_cleared_away(files, command, one_process):
    """Its message says where they are; --resume auto, which begins anew, is not to remove them."""
    size = (files / "one" / "adapter.safetensors").stat().st_size
    argv = command("refused", "--resume", "auto")
    process = start(argv)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2 * size, 2 * size))  # less than the optimizer's state has
    _, said = finish(process, 2)
    folder = files / "refused"
    told = f"error: cannot write {folder}/checkpoints/.step-00000004: .*; the trained tensors are in {folder}/adapter"
    assert re.search(f"^{told}.safetensors; no checkpoint had been saved yet", said, re.M), said
    assert os.listdir(folder / "checkpoints") == []
    kept = (folder / "adapter.safetensors").read_bytes()
    _, said = finish(start(argv), 2)
    assert "already holds adapter.safetensors" in said
    assert (folder / "adapter.safetensors").read_bytes() == kept


def test_names_that_lead_nowhere_are_told_or_made(files, command):
    _, said = finish(start(command("x" * 300)), 2)
    assert re.fullmatch(r"error: \S+x{300}: file name too long; choose a shorter one\n", said), said
    (files / "link").symlink_to(files / "its folder")  # which is not there yet
    finish(start(command("link", "--epoch_steps", "1", "--epoch_count", "1")))
    assert (files / "its folder" / "adapter.safetensors").exists()


def test_a_disk_without_room_for_a_save_is_told_before_the_first_step(files, command, monkeypatch):
    from rwkv_peft.training.run import main

    monkeypatch.setattr("rwkv_peft.files.room.room_at", lambda path: 1000)
    with pytest.raises(UserError, match=r"--proj_dir \S+ needs [\d,]+ bytes for a save, and its disk has 1,000 free"):
        main(command("no-room")[2:])
    assert not (files / "no-room").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_a_tensor_that_is_not_finite_ends_the_run_on_every_rank(keep):
    from rwkv_peft.training.lit import Diverged
    from rwkv_peft.training.saver import gather

    with pytest.raises(Diverged, match="w is no longer finite"):
        gather([("w", torch.tensor([1.0, math.inf]))], zero_stage_3=False, keep=keep)


def test_a_checkpoint_that_does_not_know_a_setting_has_its_default(tmp_path):
    from dataclasses import asdict

    from rwkv_peft.config import AdapterConfig

    known = {name: value for name, value in asdict(AdapterConfig(rank=16)).items() if name != "init"}
    machine = {"strategy": "deepspeed_stage_1", "world_size": 1, "precision": "bf16"}
    (tmp_path / "state.json").write_text(
        json.dumps({"adapter": known, "base": "abc", "samples_seen": 1, "trained": [], **machine})
    )
    now = {"adapter": asdict(AdapterConfig(rank=16)), "base": "abc", "data": {"ctx_len": 16}}
    assert read_run_state(tmp_path, now, True)["base"] == "abc"
    other = asdict(AdapterConfig(rank=16, init="init_pissa.pth"))
    with pytest.raises(
        UserError, match="has adapter {'init': ''}, .* {'init': 'init_pissa.pth'}; give the first run's flags"
    ):
        read_run_state(tmp_path, now | {"adapter": other}, True)


def test_a_new_run_continues_from_an_adapter(files, train, one_process):
    out, _ = train(
        "again",
        "--precision",
        "fp32",
        "--micro_bsz",
        "4",
        "--epoch_count",
        "3",
        "--epoch_begin",
        "2",
        "--bone_load",
        str(files / "one" / "adapter.safetensors"),
    )
    lines = metrics(files, "again")
    assert [line["step"] for line in lines] == [8, 9, 10, 11]
    assert lines[0]["loss"] < metrics(files, "one")[0]["loss"]


def test_a_diverged_run_stops_names_the_step_and_keeps_the_checkpoint(files, train):
    _, err = train(
        "nan",
        "--precision",
        "fp32",
        "--lr_init",
        "1e30",
        "--lr_schedule",
        "constant",
        "--warmup_steps",
        "0",
        "--gradient_clip_val",
        "0",
        "--epoch_steps",
        "1",
        "--epoch_count",
        "9",
        code=1,
    )
    assert "step 1" in err and "step-00000001" in err and "Traceback" not in err
    assert all(torch.isfinite(t).all() for t in load_file(files / "nan" / "adapter.safetensors").values())


def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(files, train):
    """The loss alone would not tell: lora_B begins at 0, and only its gradient is multiplied by the scale."""
    _, err = train(
        "infinite",
        "--precision",
        "fp32",
        "--peft",
        "lora",
        "--lora_config",
        '{"lora_r": 4, "lora_alpha": 1e38}',
        code=1,
    )
    assert "gradient norm became inf at step 0" in err and "Traceback" not in err
    assert (
        not (files / "infinite" / "checkpoints").exists() and not (files / "infinite" / "adapter.safetensors").exists()
    )
    assert metrics(files, "infinite") == []


@pytest.mark.parametrize("norm", [math.inf, math.nan, -1.0])  # DeepSpeed's -1 is a norm that it found not finite
def test_a_norm_that_is_not_finite_in_any_spelling(norm):
    from rwkv_peft.training.callbacks import FiniteGradients
    from rwkv_peft.training.lit import Diverged

    engine = SimpleNamespace(get_global_grad_norm=lambda: torch.tensor(norm))
    trainer, lit = SimpleNamespace(strategy=SimpleNamespace(deepspeed_engine=engine)), SimpleNamespace(step=7)
    with pytest.raises(Diverged, match="at step 7"):
        FiniteGradients(accumulate=1).on_train_batch_end(trainer, lit, None, None, 0)


def test_a_new_model_trains_from_scratch_and_is_a_base(files, train):
    train(
        "new",
        "--load_model",
        "",
        "--peft",
        "none",
        "--n_layer",
        "2",
        "--n_embd",
        "64",
        "--vocab_size",
        "80",
        "--precision",
        "fp32",
        "--micro_bsz",
        "4",
        "--random_seed",
        str(2**63 - 1),
    )

    assert open_base(files / "new" / "rwkv.pth").tensors["emb.weight"].shape == (80, 64)
    assert metrics(files, "new")[-1]["loss"] < metrics(files, "new")[0]["loss"]


@pytest.mark.parametrize(
    "method", ["bone-mini", "bone-signed", "bat-in-scaled", "bat-out nf4", "lora-plus", "dora", "pissa", "lora-ga"]
)
def test_every_method_trains_validates_and_merges(files, accelerator, method):
    """In one short run each: packed documents, a validation split, the best adapter, and the merge of it."""
    flags = {
        "bone-mini": ["--bone_mode", "bone-mini", "--bone_r", "8", "--bone_mini_r", "4"],
        "bone-signed": ["--bone_mode", "bone-signed", "--bone_r", "16"],
        "bat-in-scaled": ["--bone_mode", "bat-in-scaled", "--bone_r", "16"],
        "bat-out nf4": ["--bone_mode", "bat-out", "--quant", "nf4", "--bone_r", "16"],
        "pissa": ["--peft", "pissa", "--pissa_config", '{"pissa_r": 4, "svd_niter": 2}'],
    }.get(method, ["--peft", method, "--lora_config", '{"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}'])
    if "nf4" in method:
        pytest.importorskip("bitsandbytes")
    base, data, folder = files / "base.pth", files / "data", files / method
    finish(
        start(
            [
                sys.executable,
                str(ROOT / "train.py"),
                "--load_model",
                str(base),
                "--data_file",
                str(data),
                "--proj_dir",
                str(folder),
                "--ctx_len",
                "96",
                "--lr_init",
                "3e-3",
                "--lr_final",
                "3e-3",
                "--accelerator",
                accelerator,
                "--dataload",
                "pack",
                "--val_split",
                "0.2",
                "--micro_bsz",
                "2",
                "--epoch_count",
                "3",
                *flags,
            ]
        )
    )
    lines = metrics(files, method)
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (folder / "adapter-best.safetensors").exists()
    merged = files / f"{method}.pth"
    finish(
        start(
            [
                sys.executable,
                str(ROOT / "merge_bone.py"),
                "--base_model",
                str(base),
                "--bone_checkpoint",
                str(folder / "adapter-best.safetensors"),
                "--output",
                str(merged),
            ]
        )
    )
    original, result = torch.load(base), torch.load(merged)
    assert list(original) == list(result)
    changed = [key for key in original if not torch.equal(original[key], result[key])]
    assert len(changed) == 16


def test_early_stop_ends_a_run_that_no_longer_improves(files, train):
    train(
        "early",
        "--precision",
        "fp32",
        "--lr_init",
        "0",
        "--lr_final",
        "0",
        "--warmup_steps",
        "0",
        "--val_data",
        str(files / "data"),
        "--val_every",
        "1",
        "--early_stop",
        "2",
    )
    lines = metrics(files, "early")
    assert len(lines) == 3 and "val_ppl" in lines[0]
    assert (files / "early" / "adapter.safetensors").exists()


def test_rows_of_questions_train_without_preprocessing(files, train):
    rows = [{"query": f"{i} + 1?", "response": str(i + 1)} for i in range(40)]
    (files / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(
        "scratch",
        "--load_model",
        "",
        "--peft",
        "none",
        "--n_layer",
        "1",
        "--n_embd",
        "64",
        "--vocab_size",
        "257",
        "--data_type",
        "sft",
        "--tokenizer",
        "bytes",
        "--sft_field",
        "query",
        "response",
        "--data_file",
        str(files / "rows.jsonl"),
        "--precision",
        "fp32",
        "--micro_bsz",
        "8",
    )
    assert metrics(files, "scratch")[-1]["loss"] < metrics(files, "scratch")[0]["loss"]
