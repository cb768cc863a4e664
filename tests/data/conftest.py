"""Fixtures of the tests of data."""

import json

import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.preprocess import main


@pytest.fixture
def preprocess(tmp_path):
    """preprocess(content, *flags, name=) -> the BinidxDataset made of one input file, byte tokens."""

    def run(content, *flags, name="in.jsonl"):
        path = tmp_path / name
        if not isinstance(content, (str, bytes)):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        output = tmp_path / "out" / "data"
        assert main([str(path), "--output", str(output), "--tokenizer", "bytes", "--overwrite", *flags]) == 0
        return BinidxDataset(output)

    return run


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """answers(data_type)(rows, **settings) -> a DataConfig over a file of rows, with the test's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def of_type(data_type):
        def write(rows, **settings):
            path = tmp_path / f"{data_type}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = {"dataload": "pack", "loss_mask": "file", "tokenizer": "bytes"} | settings
            return DataConfig(str(path), **{"data_type": data_type} | settings)

        return write

    return of_type
