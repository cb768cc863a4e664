"""Fixtures of the tests of generation."""

import io
import sys

import pytest
import torch

from inference.engines import spread_logits, tokens_of
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli import commands
from rwkv_peft.inference import command, engine


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_state):
    """The path of a random byte-vocabulary model."""
    state = spread_logits(tiny_state, vocab_size=257)
    state["head.weight"][0] = 0  # logit 0 for the end of text, below the largest of 256 others
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_model(path, state)
    return path


@pytest.fixture
def run(model, capsys):
    """Run the command with the model -> what it printed."""

    def run(*arguments):
        assert command.main(["--model", str(model), *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def chat(model, monkeypatch, capsys):
    """chat(lines, *flags, says=texts) -> (stdout, stderr, the logits of every draw), with the lines coming from a pipe.
    says: the texts that the model draws, one for each answer ("|" at the end stands for END; an int interrupts)."""

    def run(lines, *flags, says=None):
        logits, drawn = [], iter([token for text in says or () for token in tokens_of(text)])

        def scripted(choices, uniforms, sampling):
            logits.append(choices)
            token = next(drawn)
            if token < 0:
                raise KeyboardInterrupt
            return torch.tensor([token])

        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
            if says is not None:
                patch.setattr(engine, "draw_of", lambda *_: scripted)
            assert commands.main(["generate", "--model", str(model), "--chat", *map(str, flags)]) == 0
        return *capsys.readouterr(), logits

    return run
