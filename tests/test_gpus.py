"""GPUs that torch cannot use: the driver is too old for its CUDA, or does not answer, or it has no code for the card.
Every command that would use one ends with the reason; with the flags for the CPU it runs there."""

import errno
import os
import re
import sys
from contextlib import nullcontext

import pytest
import torch

from rwkv_peft import gpus
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli.commands import main as commands
from rwkv_peft.cli.errors import UserError, exit_on_user_error
from rwkv_peft.config import TrainConfig
from rwkv_peft.gpus import count_gpus
from rwkv_peft.hf.finetune import adapt
from rwkv_peft.release.merge_command import main as merge
from rwkv_peft.tools.doctor import MISSING, check_devices
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.model import own_device
from rwkv_peft.training.ranks.world import World
from rwkv_peft.training.run import main as train
from rwkv_peft.training.zero import RunEnvironment, devices_here

SCRIPT = "(TORCH=cu126 sh scripts/setup.sh; TORCH=pip from a mirror of PyPI)"
CUDA_13 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120".split()
LINUX = "6.12.41-amd64\n"  # osrelease
WORDS = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.fixture(autouse=True)
def old_driver(monkeypatch):
    def init():
        raise RuntimeError(f"{WORDS}\nPlease update your GPU driver")

    monkeypatch.setattr("rwkv_peft.tools.plan.command.has_gpu", lambda: True)
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
        return error.partition(
            f"cannot use it: {WORDS}; update the driver, install a build of torch for an older CUDA "
        )[2]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_state):
    path = tmp_path_factory.mktemp("model") / "base.pth"
    save_model(path, tiny_state(vocab_size=257))
    return path


def test_every_command_that_would_use_it_ends_with_torchs_words(available, refused, model, tmp_path):
    (tmp_path / "rows.txt").write_text("text\n")
    rows = ("--data_file", tmp_path / "rows.txt", "--data_type", "sft", "--tokenizer", "bytes")
    run = ("--load_model", model, *rows, "--bone_r", "16", "--proj_dir", tmp_path / "out")
    told = f"{SCRIPT}, or train with --accelerator cpu\n"
    assert refused(train, *run) == refused(train, *run, "--accelerator", "gpu", "--check_flags") == told
    assert refused(commands, "plan", *run) == f"{SCRIPT}, or name the memory of a GPU with --gpu 24GiB\n"
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for command, *more in (("generate", "--prompt", "a"), ("eval", "jsonl", "--data", tmp_path / "questions.jsonl")):
        told = refused(commands, command, *more, "--model", model)
        assert told == f"{SCRIPT}, or run on the CPU with --device cpu\n"
    merging = ("--base_model", model, "--lora_checkpoint", model, "--dry_run", "--device", "cuda")
    assert refused(merge, *merging) == f"{SCRIPT}, or leave --device out to merge on the CPU\n"
    told = f"{SCRIPT}, or train on the CPU with --use_cpu True\n"
    assert refused(lambda argv: adapt(argv, (), False)) == told


def test_the_cpu_serves_whoever_asks_for_it(available, model, tmp_path, capsys):
    generated = ("generate", "--model", str(model), "--prompt", "a", "--max_tokens", "1")
    assert commands([*generated, "--device", "cpu"]) == 0
    run = ("--load_model", str(model), "--bone_r", "16", "--proj_dir", str(tmp_path / "out"))
    assert commands(["plan", *run, "--accelerator", "cpu"]) == 0 == commands(["plan", *run, "--gpu", "24GiB"])
    assert adapt(["--use_cpu", "True"], (), False) == ["--use_cpu", "True"]


def test_doctor_tells_it(available, capsys):
    assert commands(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"cannot use it: {WORDS}\n" in printed and "train with --accelerator cpu" in printed
    assert "training cannot run here: see GPU above" in printed


@pytest.mark.parametrize(
    "capability, known, words",
    [
        ((7, 0), CUDA_13, f"a card has compute capability 7.0, and it has code for sm_75, .*{re.escape(SCRIPT)}"),
        ((8, 9), ["sm_90", "compute_90"], "8.9, and it has code for sm_90, compute_90; update the driver"),
        ((12, 0), ["sm_80", "sm_90"], "12.0, and it has code for sm_80, sm_90; install a newer torch"),
        ((10, 3), ["sm_80", "sm_100a"], "10.3, and it has code for sm_80, sm_100a; install a newer torch"),
        *(
            ((major, minor), CUDA_13, "")
            for major, minor in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0))
        ),
        ((7, 0), ["sm_50", "sm_60", "sm_70"], ""),
        ((9, 4), ["gfx942"], ""),  # a card of AMD
    ],
)
def test_a_card_that_torch_has_no_code_for_is_told_with_the_build_that_has_it(monkeypatch, capability, known, words):
    for name, value in {"init": None, "get_device_capability": capability, "get_device_name": "a card"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: known)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if words:
        with pytest.raises(UserError, match=f"this machine has 1 GPU, and torch .* cannot use it: .*{words}"):
            count_gpus("…")
    else:
        assert count_gpus("…") == 1


ANSWER = "the driver does not answer; restart"


@pytest.mark.parametrize(
    "there, cuda, visible, error, words",
    [
        (2, "13.0", None, 0, f"this machine has 2 GPUs, and torch .* cannot use them: {ANSWER}"),
        (1, "13.0", "0", 0, "this machine has 1 GPU, .* or train with --accelerator cpu"),
        (1, "13.0", "", 0, ""),  # hidden
        (1, "13.0", "-1", 0, ""),
        (2, None, None, 0, "them: it is built without CUDA; .*TORCH=auto sh"),  # set up on a login node
        (2, "13.0", None, errno.EPERM, ""),  # a job of Slurm without a GPU
        (2, None, None, errno.EPERM, ""),
        (2, "13.0", None, errno.EACCES, ANSWER),
        ("dxg", "13.0", None, 0, f"has 1 GPU, .*{ANSWER}"),  # WSL
        ("dxg", None, None, 0, "it: it is built without CUDA"),
        (0, "13.0", None, 0, ""),
    ],
)
def test_a_card_that_is_there_and_not_counted_is_not_passed_over(
    monkeypatch, tmp_path, there, cuda, visible, error, words
):
    """As after an update of the driver, by which NVML breaks."""
    devices = ["dxg"] if there == "dxg" else [f"nvidia{number}" for number in range(there)]
    for name in ("nvidiactl", "nvidia-uvm", *devices):
        (tmp_path / name).touch()
    for name, path in {"DEVICES": "", "WSL_DEVICE": "dxg", "WSL_DRIVER": "dxg"}.items():
        monkeypatch.setattr(gpus, name, tmp_path / path)
    real = os.open

    def opened(path, *how, **more):
        if error and str(path).startswith(f"{tmp_path}/nvidia"):
            raise OSError(error, os.strerror(error), str(path))
        return real(path, *how, **more)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if words:
        with pytest.raises(UserError, match=words):
            count_gpus("train with --accelerator cpu")
        (finding,) = check_devices()
        assert finding.status == MISSING and finding.text.endswith(("driver does not answer", "built without CUDA"))
    else:
        assert count_gpus("train with --accelerator cpu") == 0


@pytest.mark.parametrize("visible, index", [(4, 3), (1, 0)])
def test_a_rank_has_a_device_of_its_own_which_is_the_current_one(monkeypatch, visible, index):
    """The one that it sees, if its launcher shows each rank one."""
    chosen, world = [], World(2, 4, 7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device("gpu", world.local_rank) == torch.device("cuda", index) and chosen == [index]
    train_config = TrainConfig(devices=4)
    for device, number in (("cuda", index), ("cpu", 3)):
        assert RunEnvironment(world, devices_here(train_config, torch.device(device))).local_rank() == number
    assert own_device("cpu", 3) == torch.device("cpu")


@pytest.mark.parametrize(
    "environment, fits",
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "2"}, True),
        ({"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "GPU-5a"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "CUDA_VISIBLE_DEVICES": "2"}, False),  # one process, which starts the ranks
    ],
)
def test_a_launcher_may_show_each_rank_one_gpu(monkeypatch, environment, fits):
    monkeypatch.setattr(gpus, "count_gpus", lambda instead: 1)
    for name in ("SLURM_STEP_NUM_TASKS", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with nullcontext() if fits else pytest.raises(UserError, match="--devices 4 and this machine has 1 GPU"):
        assert gpus.resolve_accelerator(TrainConfig(devices=4)) == "gpu"


@pytest.mark.parametrize(
    "flags, own, kernel, expected",
    [
        (("--dataload", "pad"), {}, LINUX, "expandable_segments:True"),
        (("--dataload", "pad"), {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, LINUX, "backend:native"),
        (("--dataload", "pad"), {"PYTORCH_ALLOC_CONF": "backend:native"}, LINUX, None),
        (("--dataload", "pad"), {}, "5.15.153.1-microsoft-standard-WSL2\n", None),
        (("--dataload", "get"), {}, LINUX, None),
    ],
)
def test_memory_is_in_segments_that_grow_where_rows_are_padded(
    monkeypatch, model, tmp_path, flags, own, kernel, expected
):
    """From before CUDA starts, which is as GPUs are counted."""
    seen = []
    (tmp_path / "osrelease").write_text(kernel)
    monkeypatch.setattr(gpus, "KERNEL", tmp_path / "osrelease")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpus, "count_gpus", lambda instead: seen.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF")) or 1)
    argv = ["--load_model", str(model), "--data_file", str(tmp_path / "data"), "--bone_r", "16", "--lr_init", "1e-3"]
    parse_run([*argv, *flags])
    assert seen == [expected]


@pytest.mark.parametrize(
    "capability, flags, precision",
    [
        ((7, 5), (), "fp16"),
        ((7, 5), ("--precision", "bf16"), "bf16"),
        ((7, 5), ("--accelerator", "cpu"), "bf16"),
        ((7, 5), ("--train_type", "infctx"), "bf16"),  # whose segments go back before the loss is scaled
        ((6, 1), (), "bf16"),  # which multiplies neither fast
        ((8, 0), (), "bf16"),
    ],
)
def test_fp16_is_the_default_on_cards_that_multiply_bf16_slowly(
    monkeypatch, model, tmp_path, capability, flags, precision
):
    monkeypatch.setattr(gpus, "resolve_accelerator", lambda train: "gpu")
    monkeypatch.setattr(gpus, "grow_segments", lambda: None)
    for name, value in {"is_available": True, "get_device_capability": capability, "get_device_name": "a T4"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    (tmp_path / "rows.txt").write_text("text\n")
    rows = ("--data_file", str(tmp_path / "rows.txt"), "--data_type", "sft", "--tokenizer", "bytes")
    run = ("--load_model", str(model), *rows, "--bone_r", "16", "--proj_dir", str(tmp_path / "out"))
    request = parse_run([*run, *flags])
    assert request.config.train.precision == precision
    chosen = "--precision fp16 is chosen, because a T4 (compute capability 7.5) multiplies bf16 slowly"
    assert (chosen in request.notes) == (precision == "fp16")
