"""Fixtures of the tests that run train.py: a base with data, and the command that trains on it."""

import sys
from pathlib import Path

import pytest
import torch

from rwkv_peft.data.token_file_writer import TokenFileWriter
from training.runs import ROOT, finish, start_ranks


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_state):
    """A base model and data in which the next token follows from the last, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("run")
    torch.save(tiny_state(dtype=torch.bfloat16), folder / "base.pth")
    with TokenFileWriter(folder / "data", vocab_size=80) as writer:
        for start in range(40):
            writer.add([1 + (start + 7 * i) % 79 for i in range(50 + start)] + [0])
    return folder


@pytest.fixture(scope="module")
def kept(files):
    """Text in which other tokens follow each other than in the data."""
    with TokenFileWriter(files / "kept", vocab_size=80) as writer:
        for start in range(5):
            writer.add([1 + (start + 11 * i) % 79 for i in range(40)] + [0])
    return str(files / "kept")


@pytest.fixture(scope="module")
def command(files, accelerator):
    """(name of the run's folder, flags) -> the command that trains there; skips the test if there are too few GPUs."""

    def build(name, *more):
        devices = int(more[more.index("--devices") + 1]) if "--devices" in more else 1
        if accelerator == "gpu" and torch.cuda.device_count() < devices:
            pytest.skip(f"needs {devices} GPUs")
        paths = {"load_model": files / "base.pth", "data_file": files / "data", "proj_dir": files / name}
        words = [word for flag, path in paths.items() for word in (f"--{flag}", str(path))]
        words += "--ctx_len 24 --lr_init 1e-2 --lr_final 1e-3 --warmup_steps 2 --epoch_steps 4 --epoch_count 2".split()
        words += ["--accelerator", accelerator, *(() if "--peft" in more else ("--bone_r", "16"))]
        return [sys.executable, str(ROOT / "train.py"), *words, *more]

    return build


@pytest.fixture(scope="module")
def train(command):
    """Train by `command` to the end, on all its ranks -> stdout and stderr of the first."""

    def run(name, *more, code=0, **named):
        ranks = start_ranks(command(name, *more))
        try:
            return [finish(rank, code, **named) for rank in ranks][0]
        finally:
            for rank in ranks:
                rank.kill()  # where others are waited for in vain

    return run


@pytest.fixture
def quick_compiler(monkeypatch):
    """Compile DeepSpeed's optimizer, which offload needs, without optimizations."""
    monkeypatch.setenv("CXX", str(Path(__file__).with_name("quick-g++")))
