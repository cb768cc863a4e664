"""binidx files: written as the format says, read back, refused if they are damaged; a set is never half old and half
new."""

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.recorded import binidx_prefix
from rwkv_peft.data.token_file_writer import TokenFileWriter

IDX = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ2i2q3q", 1, 8, 2, 3, 3, 1, 0, 6, 0, 1, 2)
BIN = struct.pack("<4H", 7, 8, 0, 65535)


def write(folder, idx=IDX, data=BIN, mask=None):
    """Write a .bin/.idx pair (None leaves a file out) and return its prefix."""
    for end, content in ((".idx", idx), (".bin", data), (".mask", mask)):
        (folder / f"data{end}").unlink(missing_ok=True)
        if content is not None:
            (folder / f"data{end}").write_bytes(content)
    return str(folder / "data")


def documents(dataset):
    return [document.tolist() for document in dataset]


def test_reads_hand_made_bytes(tmp_path):
    dataset = BinidxDataset(write(tmp_path))
    assert documents(dataset) == [[7, 8, 0], [65535]]
    assert dataset.tokens.tolist() == [7, 8, 0, 65535]
    assert dataset.mask is None


def test_writes_exactly_these_bytes(tmp_path):
    with TokenFileWriter(tmp_path / "new" / "data") as writer:
        writer.add([7, 8, 0])
        writer.add([65535])
    assert (tmp_path / "new" / "data.idx").read_bytes() == IDX
    assert (tmp_path / "new" / "data.bin").read_bytes() == BIN
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["data.bin", "data.idx"]


@given(st.lists(st.lists(st.integers(0, 70000), max_size=9), min_size=1, max_size=9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory, content, masked):
    if not any(content):
        content.append([0])
    prefix = tmp_path_factory.mktemp("round") / "data"
    with TokenFileWriter(prefix, vocab_size=70001) as writer:
        for document in content:
            writer.add(document, [token % 2 for token in document] if masked else None)
    dataset = BinidxDataset(prefix)
    assert documents(dataset) == content
    flat = [token % 2 for document in content for token in document]
    assert dataset.mask is None if not masked or all(flat) else dataset.mask.tolist() == flat


@pytest.mark.parametrize("code, form", [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_integer_token_type(tmp_path, code, form):
    size = struct.calcsize(form)
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ2i2qq", 1, code, 2, 1, 2, 1, 0, 2 * size, 0)
    dataset = BinidxDataset(write(tmp_path, idx, struct.pack(f"<3{form}", 1, 2, 3)))
    assert documents(dataset) == [[1, 2], [3]]


def replaced(offset, value):
    return IDX[:offset] + value + IDX[offset + len(value) :]


@pytest.mark.parametrize(
    "idx, data, message",
    [
        (None, BIN, r"data\.idx: no such file"),
        (IDX, None, r"data\.bin: no such file"),
        (b"", BIN, "0 bytes, shorter than its 34-byte header"),
        (IDX[:20], BIN, "20 bytes, shorter"),
        (IDX[:-1], BIN, r"81 bytes, but 2 documents \(count\).*take 82"),
        (IDX + b"x", BIN, "83 bytes"),
        (b"TNTIDX\x00\x00\x00" + IDX[9:], BIN, "an MMIDIDX index begins"),
        (replaced(9, struct.pack("<Q", 2)), BIN, "version 2"),
        (replaced(17, b"\x06"), BIN, "dtype code 6"),
        (replaced(18, struct.pack("<Q", 1 << 60)), BIN, "count"),
        (replaced(34, struct.pack("<i", -3)), BIN, r"sizes\[0\] = -3 is negative"),
        (replaced(34, struct.pack("<i", 2)), BIN, r"pointers\[1\] = 6, and the documents before it end at byte 4"),
        (replaced(42, struct.pack("<q", -2)), BIN, r"pointers\[0\] = -2"),
        (IDX, b"", r"data\.bin: 0 bytes, but the sizes in .*data\.idx add up to 8"),
        (IDX, BIN[:-1], "7 bytes"),
        (IDX, BIN + b"\0\0", "10 bytes"),
        (IDX[:18] + struct.pack("<QQq", 0, 1, 0), b"", "holds no document"),
        (IDX[:18] + struct.pack("<QQiqq", 1, 1, 0, 0, 0), b"", "holds no token"),
    ],
)
def test_damage_is_named(tmp_path, idx, data, message):
    with pytest.raises(UserError, match=message):
        BinidxDataset(write(tmp_path, idx, data))


def test_rows_that_are_not_there_are_named_and_no_index_of_them(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl: no such file; a data set is a PREFIX\.bin with its PREFIX\.idx"):
        BinidxDataset(tmp_path / "rows.jsonl")


def test_a_mask_of_the_wrong_length_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.mask: 3 bytes"):
        BinidxDataset(write(tmp_path, mask=b"\1\1\0"))


def test_ids_outside_the_vocabulary_are_named(tmp_path):
    dataset = BinidxDataset(write(tmp_path))
    dataset.check_vocab(65536)
    with pytest.raises(UserError, match=r"token 65535 at position 3 \(document 1\) is outside .* vocabulary of 257"):
        dataset.check_vocab(257)


def test_a_failing_writer_leaves_the_old_files_and_nothing_else(tmp_path):
    write(tmp_path, mask=b"\1\0\1\1")
    with pytest.raises(RuntimeError), TokenFileWriter(tmp_path / "data") as writer:
        writer.add([1])
        raise RuntimeError
    assert (tmp_path / "data.idx").read_bytes() == IDX
    assert len(list(tmp_path.iterdir())) == 3


def test_a_mask_of_ones_says_nothing_and_labels_do_and_an_old_mask_goes(tmp_path):
    for mask, stays in (([2, 2], True), ([1, 1], False), ([2, 2], True), (None, False)):
        with TokenFileWriter(tmp_path / "data") as writer:
            writer.add([1, 2], mask)
        assert (tmp_path / "data.mask").exists() == stays


def test_a_file_of_rows_in_place_of_a_prefix_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"rows\.jsonl is a file of rows or text.*--data_type sft"):
        BinidxDataset(tmp_path / "rows.jsonl")


def test_prefix():
    assert [binidx_prefix(path) for path in ("a/b", "a/b.bin", "a/b.idx")] == ["a/b"] * 3


def test_reads_the_pair_that_another_tool_wrote(shared_data):
    dataset = BinidxDataset(shared_data / "binidx" / "demo")
    assert (len(dataset), len(dataset.tokens)) == (182, 66833)
    assert all(document[-1] == 0 for document in dataset)
    dataset.check_vocab(65536)


def test_a_set_in_shards_names_them(tmp_path):
    (tmp_path / "data.json").write_text('{"shards": [{"name": "data-00001", "documents": 2, "tokens": 4}]}')
    with pytest.raises(UserError, match=r"in shards, which version 0.3.0 .* --data_file .*data-00001 .*data-00002"):
        BinidxDataset(tmp_path / "data")


def test_a_set_takes_the_place_of_another_as_a_whole(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"query": "?", "response": "b", "weight": 2}')
    command = [str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "data"), "--tokenizer", "bytes"]
    assert main(command) == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"in.jsonl", *(f"data.{end}" for end in ("bin", "idx", "mask", "weights", "json"))}
    replaced = os.replace

    def until(source, target):
        if str(target).endswith("data.idx"):
            raise KeyboardInterrupt
        replaced(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", until)
        main(command)
    with pytest.raises(UserError, match="data.idx: no such file"):
        BinidxDataset(tmp_path / "data")
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    (tmp_path / "other.jsonl").write_text('{"text": "other"}')
    with pytest.raises(UserError, match="data.bin exists, made from other inputs"):
        main([str(tmp_path / "other.jsonl"), *command[1:]])
