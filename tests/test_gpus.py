"""A GPU whose driver is too old for torch's CUDA: torch counts it, but cannot use it. Every command that would use it
ends with torch's words; with the flags for the CPU it runs there."""

import sys

import pytest
import torch

from rwkv_peft.commands import main as commands
from rwkv_peft.errors import exit_on_user_error
from rwkv_peft.files.base import save_model
from rwkv_peft.hf.finetune import adapt
from rwkv_peft.release.merge_command import main as merge
from rwkv_peft.training.model import own_device
from rwkv_peft.training.run import main as train

WORDS = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.fixture(autouse=True)
def old_driver(monkeypatch):
    def init():
        raise RuntimeError(f"{WORDS}\nPlease update your GPU driver")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.fixture(params=[False, True], ids=["cudas count", "drivers count"])
def available(request, monkeypatch):
    """torch.cuda.is_available asks CUDA, or only the driver once Lightning or DeepSpeed are imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)


@pytest.fixture
def refused(monkeypatch, capsys):
    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", ["a command", *map(str, argv)])
        with pytest.raises(SystemExit) as raised:
            exit_on_user_error(main)
        error = capsys.readouterr().err
        assert raised.value.code == 2 and error.count("\n") == 1, error
        assert error.startswith("error: this machine has 1 GPU, and torch "), error
        return error.partition(f"cannot use it: {WORDS}; update the driver, install a build of torch for an ")[2]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_state):
    path = tmp_path_factory.mktemp("model") / "base.pth"
    save_model(path, tiny_state(vocab_size=257))
    return path


def test_every_command_that_would_use_it_ends_with_torchs_words(available, refused, model, tmp_path):
    run = ("--load_model", model, "--data_file", tmp_path / "no data", "--bone_r", "16", "--proj_dir", tmp_path / "out")
    told = "older CUDA, or train with --accelerator cpu\n"
    assert refused(train, *run) == refused(train, *run, "--accelerator", "gpu", "--check_flags") == told
    assert refused(commands, "plan", *run) == "older CUDA, or name the memory of a GPU with --gpu 24GiB\n"
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for command, *more in (("generate", "--prompt", "a"), ("eval", "jsonl", "--data", tmp_path / "questions.jsonl")):
        told = refused(commands, command, *more, "--model", model)
        assert told == "older CUDA, or run on the CPU with --device cpu\n"
    merging = ("--base_model", model, "--lora_checkpoint", model, "--dry_run", "--device", "cuda")
    assert refused(merge, *merging) == "older CUDA, or leave --device out to merge on the CPU\n"
    told = "older CUDA, or train on the CPU with --use_cpu True\n"
    assert refused(lambda argv: adapt(argv, (), False, False)) == told


def test_the_cpu_serves_whoever_asks_for_it(available, model, tmp_path, capsys):
    generated = ("generate", "--model", str(model), "--prompt", "a", "--max_tokens", "1")
    assert commands([*generated, "--device", "cpu"]) == 0
    run = ("--load_model", str(model), "--bone_r", "16", "--proj_dir", str(tmp_path / "out"))
    assert commands(["plan", *run, "--accelerator", "cpu"]) == 0 == commands(["plan", *run, "--gpu", "24GiB"])
    assert adapt(["--use_cpu", "True"], (), False, False) == ["--use_cpu", "True"]


def test_doctor_tells_it(available, capsys):
    assert commands(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"cannot use it: {WORDS}\n" in printed and "train with --accelerator cpu" in printed
    assert "training cannot run here: see GPU above" in printed


def test_a_rank_has_a_device_of_its_own_which_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device("gpu", 2) == torch.device("cuda", 2) and chosen == [2]
    assert own_device("cpu", 2) == torch.device("cpu") and chosen == [2]
