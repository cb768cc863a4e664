"""Files that exist but may not be read are not called missing, by any reader."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from rwkv_peft.checkpoints.tensors import read_pth
from rwkv_peft.cli.errors import UserError, exit_on_user_error
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.rows import read_chunks
from rwkv_peft.data.templates import read_template
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.plots import read_metrics


@pytest.fixture
def unreadable():
    """unreadable(name) -> the path of a file that exists but may not be read, or is in a folder "shut" that may not be
    entered; root becomes another user for the test."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)

        def make(name):
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            (Path(folder) / name.split("/")[0]).chmod(0)
            if os.geteuid() == 0:
                os.seteuid(65534)
            return path

        yield make
        if os.getuid() == 0:
            os.seteuid(0)
        for path in Path(folder).iterdir():
            path.chmod(0o700)


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_a_folder_that_may_not_be_entered_is_one_message(unreadable, monkeypatch, capsys, ending):
    path = unreadable("shut/below/in" + ending)
    monkeypatch.setattr(sys, "argv", ["preprocess", str(path), "--output", str(path.parents[2] / "out")])
    with pytest.raises(SystemExit) as exit_info:
        exit_on_user_error(main)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and f"in{ending}" in error and "permission denied" in error


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in.parquet", "in.json"])
def test_an_input_that_may_not_be_read_is_not_called_missing(unreadable, name):
    path = unreadable(name)
    with pytest.raises(UserError, match=f"{name} exists, but may not be read .permission denied"):
        list(read_chunks(path))


READERS = {"a.pth": read_pth, "data.idx": BinidxDataset, "vocabulary.txt": load_tokenizer}
READERS |= {"metrics.jsonl": read_metrics, "template.txt": read_template}


@pytest.mark.parametrize("name", READERS)
def test_no_other_file_that_may_not_be_read_is_called_missing(unreadable, name):
    path = unreadable(name)
    with pytest.raises(UserError, match=f"{name} exists, but may not be read .permission denied"):
        READERS[name](str(path))
