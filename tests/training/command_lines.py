"""Command lines of train.py on small files, and its message on one that it refuses."""

import sys

import pytest
import torch

from rwkv_peft.cli.errors import exit_on_user_error
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.training.run import main


def write_files(folder, state):
    """A base model base.pth (C 64, F 96, vocabulary 80) and data of 300 tokens below 80, in a folder."""
    torch.save(state, folder / "base.pth")
    with TokenFileWriter(folder / "data", vocab_size=80) as writer:
        for start in range(3):
            writer.add([1 + (start + i) % 79 for i in range(99)] + [0])
    return folder


@pytest.fixture
def small_files(tmp_path, tiny_state):
    return write_files(tmp_path, tiny_state())


def flags(files, *more):
    return without_rank(files, "--bone_r", "16", *more)


def without_rank(files, *more):
    """The flags of a small run that tell no --bone_r."""
    paths = f"--load_model {files}/base.pth --data_file {files}/data --proj_dir {files}/out".split()
    return [*paths, *"--ctx_len 16 --accelerator cpu --precision fp32".split(), *more]


def refused(monkeypatch, capsys, argv, code=2):
    """The message of a command that must end with this exit code and one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as exit_info:
        exit_on_user_error(main)
    error = capsys.readouterr().err
    assert exit_info.value.code == code
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
