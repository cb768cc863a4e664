"""What the tests of merging share."""

import pytest
import torch

from rwkv_peft.files.base import save_model


@pytest.fixture
def folder(tmp_path, tiny_state):
    """A folder with base.pth (bfloat16)."""
    save_model(tmp_path / "base.pth", tiny_state(dtype=torch.bfloat16))
    return tmp_path
