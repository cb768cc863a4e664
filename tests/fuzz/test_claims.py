"""A file's claims about its own sizes are not trusted: a few bytes that claim gigabytes end in a message, and take no
more memory than an honest file."""

import gzip

import pytest
import torch

from fuzz.bounds import memory_bound
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError

ROOM = 2 << 30  # bytes beyond those of this process


@pytest.fixture(autouse=True)
def bounded():
    with memory_bound(ROOM):
        yield


def refused(*words):
    """The message in which a command ends."""
    with pytest.raises(UserError) as error:
        commands.main([str(word) for word in words])
    return str(error.value)


def test_random_matrices_that_no_layer_has_room_for_are_refused(tmp_path, tiny_state):
    """A vector of 16 MiB asks VeRA for matrices of gigabytes."""
    torch.save(tiny_state(), model := tmp_path / "m.pth")
    vectors = {"b": torch.ones(64), "d": torch.ones(1 << 22), "seed": torch.zeros(1)}
    tensors = {f"blocks.0.att.key.vera_{name}": vector for name, vector in vectors.items()}
    save_adapter(adapter := tmp_path / "a.safetensors", tensors, AdapterMetadata("vera", rank=1 << 22))
    words = ("--base_model", model, "--bone_checkpoint", adapter, "--output", tmp_path / "o.pth")
    assert "vera adapter whose rank 4194304 is more than 128" in refused("merge", *words)


def preprocess(path, *flags):
    return ["preprocess", path, "--output", path.with_name("out"), "--tokenizer", "bytes", *flags]


def test_a_packed_line_is_not_unpacked_beyond_what_a_row_may_have(tmp_path):
    path, block = tmp_path / "rows.jsonl.gz", b"a" * (1 << 24)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(5):
            file.write(block)
    for words in (preprocess(path), preprocess(path, "--skip_bad_rows")):
        assert "line 2 has more than 67,108,864 bytes" in refused(*words)
