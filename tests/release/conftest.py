"""Fixtures of the tests of merging and of conversions."""

import pytest
import torch

from rwkv_peft.checkpoints.base import save_model


@pytest.fixture
def folder(tmp_path, tiny_state):
    """A folder with base.pth (bfloat16)."""
    save_model(tmp_path / "base.pth", tiny_state(dtype=torch.bfloat16))
    return tmp_path


@pytest.fixture
def model(tmp_path, tiny_state):
    """Path of a bfloat16 model of the byte vocabulary, and its state dict."""
    state = tiny_state(dtype=torch.bfloat16, vocab_size=257)
    save_model(tmp_path / "model.pth", state)
    return tmp_path / "model.pth", state
