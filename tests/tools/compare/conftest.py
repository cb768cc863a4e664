"""Fixtures of the tests of comparisons."""

import pytest
import torch

from rwkv_peft.data.shard_writer import ShardWriter


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_state):
    folder = tmp_path_factory.mktemp("compare")
    torch.save(tiny_state(n_layer=1), folder / "base.pth")
    with ShardWriter(folder / "data", vocab_size=80) as writer:
        for first in range(20):
            writer.add([1 + (first + 7 * i) % 79 for i in range(30)] + [0])
    return folder


@pytest.fixture
def there(files, monkeypatch):
    """The folder of a tiny base.pth and of its data is the current one."""
    monkeypatch.chdir(files)
