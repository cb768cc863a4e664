"""Fixtures of the tests of generation."""

import pytest

from rwkv_peft.files.base import save_model
from rwkv_peft.generate import command


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_state):
    """The path of a random byte-vocabulary model."""
    state = tiny_state(vocab_size=257, seed=3)
    state["head.weight"] = state["head.weight"] * 4
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
