"""A file of rows is read in chunks, a part of it if that is asked, and encoded by workers that change nothing."""

import json
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.encode_settings import EncodeSettings
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.rows import Chunk, read_chunks
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.workers import encode_all, later_ctrl_c


@pytest.mark.parametrize(
    "split, expected",
    [
        ("train[:3]", range(3)),
        ("train[3:5]", range(3, 5)),
        ("[2:]", range(2, 10)),
        ("train[-2:]", range(8, 10)),
        ("train[:20%]", range(2)),
        ("train[90%:]", range(9, 10)),
        ("train", range(10)),
        ("train[4:4]", ()),
    ],
)
def test_split_selects_rows(tmp_path, split, expected):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{i}\n" for i in range(10)))
    chunks = list(read_chunks(path, split))
    assert [int(item) for chunk in chunks for item in chunk.items] == list(expected)
    assert all(int(chunk.items[0]) + 1 == chunk.first for chunk in chunks)


def test_a_split_that_is_none_is_named(tmp_path):
    (tmp_path / "in.jsonl").write_text("1\n")
    with pytest.raises(UserError, match=r"write train, train\[:1000\]"):
        list(read_chunks(tmp_path / "in.jsonl", "train[oops]"))


@pytest.mark.parametrize("visible", ["x", "é", "中", "\u3000"])
def test_text_in_pieces_has_the_same_tokens(tmp_path, monkeypatch, visible):
    import rwkv_peft.data.rows as rows

    text = "".join(f"{visible} line {i}\n{'  ' * (i % 3)}\n\n\t{visible * (i % 5)}\n" for i in range(200)) + visible
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(rows, "CHUNK_BYTES", 64)
    chunks = list(read_chunks(tmp_path / "in.txt", pieces=True))
    assert "".join(item for chunk in chunks for item in chunk.items) == text
    assert len(chunks) == 1 if visible.isspace() else len(chunks) > 8  # which no line begins with
    assert main([str(tmp_path / "in.txt"), "--output", str(tmp_path / "data")]) == 0
    (document,) = BinidxDataset(tmp_path / "data")
    assert document.tolist() == load_tokenizer("world").encode(text) + [0]


def test_workers_do_not_change_the_documents(tmp_path, monkeypatch):
    import rwkv_peft.data.rows as rows

    monkeypatch.setattr(rows, "CHUNK_BYTES", 256)
    rows = [{"query": "q" * (i % 9), "response": str(i)} for i in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EncodeSettings("bytes")

    def encoded(workers):
        parts = list(encode_all(read_chunks(tmp_path / "in.jsonl"), settings, workers))
        return [(part.sizes, part.tokens, part.mask) for part in parts]

    assert len(encoded(1)) > 4
    assert encoded(2) == encoded(1)


def test_ctrl_c_while_a_worker_begins_comes_afterwards():
    steps = []
    with pytest.raises(KeyboardInterrupt), later_ctrl_c():
        signal.raise_signal(signal.SIGINT)
        steps.append("the worker has begun")
    assert steps


def test_a_worker_that_is_killed_is_told(tmp_path):
    def chunks():
        for number in range(40):
            yield Chunk("in.jsonl", number, (b'{"text": "a"}',))
            if number == 20:  # both have begun
                for child in multiprocessing.active_children():
                    child.kill()

    with pytest.raises(UserError, match="ended from outside.*memory.*fewer than --workers 2"):
        list(encode_all(chunks(), EncodeSettings("bytes"), 2))


@pytest.mark.parametrize(
    "error",
    [
        OSError("handle is closed"),
        ValueError("bad value(s) in fds_to_keep"),
        BlockingIOError(11, "Resource temporarily unavailable"),
    ],
)
def test_a_worker_that_cannot_begin_is_told(error, monkeypatch):
    def submit(pool, *work):  # another one was killed while this one began
        raise error

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with pytest.raises(UserError, match="could not begin.*fewer than --workers 2"):
        list(encode_all([Chunk("in.jsonl", 0, (b'{"text": "a"}',))], EncodeSettings("bytes"), 2))
