"""binidx files: written as the format says, read back, refused if they are damaged; in shards the same batches as of
one file, and a set that is never half old and half new."""

import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.binidx import BinidxDataset, open_dataset
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.recorded import binidx_prefix, default_mask
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.data.sources import build_samples
from rwkv_peft.training.saving.resume import digest_of_data

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
    with ShardWriter(tmp_path / "new" / "data") as writer:
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
    with ShardWriter(prefix, vocab_size=70001) as writer:
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
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "data") as writer:
        writer.add([1])
        raise RuntimeError
    assert (tmp_path / "data.idx").read_bytes() == IDX
    assert len(list(tmp_path.iterdir())) == 3


def test_a_mask_of_ones_says_nothing_and_labels_do_and_an_old_mask_goes(tmp_path):
    for mask, stays in (([2, 2], True), ([1, 1], False), ([2, 2], True), (None, False)):
        with ShardWriter(tmp_path / "data") as writer:
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows with and without a weight, of which the first have no mask, in one file and in shards."""
    folder = tmp_path_factory.mktemp("shards")
    rows = [{"text": "a" * (3 + 7 * n % 40)} for n in range(30)]
    rows += [{"query": "?" * (n % 5), "response": "b" * n, "weight": 1 + n % 3} for n in range(1, 40)]
    rows.append({"text": "c" * 500})  # a shard by itself
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(folder, "one")
    command(folder, "cut", "--shard_tokens", "300")
    return folder


def command(folder, name, *flags):
    assert main([str(folder / "in.jsonl"), "--output", str(folder / name), "--tokenizer", "bytes", *flags]) == 0


def test_shards_hold_whole_documents_and_no_more_tokens_than_asked_for(folder):
    manifest = json.loads((folder / "cut.json").read_text())
    shards = [BinidxDataset(folder / entry["name"]) for entry in manifest["shards"]]
    assert [entry["name"] for entry in manifest["shards"]] == [f"cut-{n:05}" for n in range(1, len(shards) + 1)]
    assert len(shards) > 4 and all(len(shard.tokens) <= 300 or len(shard) == 1 for shard in shards)
    assert shards[0].mask is None and shards[0].weights is None and shards[-2].mask is not None
    told = [[entry["documents"], entry["tokens"]] for entry in manifest["shards"]]
    assert [[len(shard), len(shard.tokens)] for shard in shards] == told
    names = {"in", "one", "cut", *(entry["name"] for entry in manifest["shards"])}
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == names
    assert default_mask(folder / "cut") == default_mask(folder / "one") == "file"


@pytest.mark.parametrize("dataload", ["get", "pad", "only", "pack"])
@pytest.mark.parametrize("loss_mask", ["file", "none", "qa"])
def test_batches_are_those_of_one_file_to_the_bit(folder, dataload, loss_mask):
    markers = (98, 98) if loss_mask == "qa" else ()
    config = DataConfig(path=str(folder / "one"), ctx_len=48, dataload=dataload, loss_mask=loss_mask, mask_id=markers)
    one, cut = (build_samples(replace(config, path=str(folder / name)), 257) for name in ("one", "cut"))
    notes = [note for note in cut.notes if "cut." not in note and "cut-" not in note]
    assert len(one) == len(cut) and [note for note in one.notes if "one." not in note] == notes
    rows = 1 if dataload == "only" else 3
    numbers = (0, len(one) // rows, 10**9 // rows)
    for first in numbers:
        left, right = (TrainBatches(samples, rows).batch(first * rows, 0) for samples in (one, cut))
        for name, tensor in left.items():
            assert not isinstance(tensor, torch.Tensor) or torch.equal(tensor, right[name]), name


def test_a_shard_of_another_set_or_none_is_told(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = DataConfig(path=str(tmp_path / "cut"), ctx_len=16, dataload="pad", loss_mask="file")
    digest = digest_of_data(type("Run", (), {"data": config}), build_samples(config, 257))
    entry = json.loads((tmp_path / "cut.json").read_text())["shards"]

    def told(content):
        (tmp_path / "cut.json").write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            open_dataset(tmp_path / "cut")
        return str(error.value)

    said = told({"shards": [{"name": "cut-00001"}]})
    assert "cut.json: a shard is {name, documents, tokens}, and one is {'name': 'cut-00001'}" in said
    other = {"name": "cut-00002"} | {key: entry[0][key] for key in ("documents", "tokens")}
    assert "cut-00002 of" in (said := told({"shards": [other]})) and "it is of another set" in said
    (tmp_path / "far").mkdir()
    for path in tmp_path.glob("cut-00001.*"):
        path.rename(tmp_path / "far" / path.name)
    assert "cut.json names the shard" in (said := told({"shards": entry})) and "cut-00001.idx: no such file" in said
    for name in ("\0", "\ud800"):
        assert "no such file" in told({"shards": [entry[0] | {"name": name}]})
    moved = [entry[0] | {"name": "far/cut-00001"}, *entry[1:]]  # on another disk
    (tmp_path / "cut.json").write_text(json.dumps({"shards": moved}))
    assert len(open_dataset(tmp_path / "cut")) == len(BinidxDataset(folder / "one"))
    assert digest_of_data(type("Run", (), {"data": config}), build_samples(config, 257)) == digest


def test_a_set_takes_the_place_of_another_kind_as_a_whole(folder, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes((folder / "in.jsonl").read_bytes())
    command(tmp_path, "data", "--shard_tokens", "200")
    many = len(list(tmp_path.glob("data-*.idx")))
    command(tmp_path, "data", "--shard_tokens", "900")
    assert 1 < len(list(tmp_path.glob("data-*.idx"))) < many
    replaced = os.replace

    def until(source, target):
        if str(target).endswith("data-00002.bin"):
            raise KeyboardInterrupt
        replaced(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", until)
        command(tmp_path, "data", "--shard_tokens", "300")
    with pytest.raises(UserError, match="data-00002.idx: no such file"):
        open_dataset(tmp_path / "data")
    command(tmp_path, "data", "--shard_tokens", "300")
    command(tmp_path, "data")
    files = {"in.jsonl", *(f"data.{end}" for end in ("bin", "idx", "mask", "weights", "json"))}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert (tmp_path / "data.bin").read_bytes() == (folder / "one.bin").read_bytes()
    (tmp_path / "other.jsonl").write_text('{"text": "other"}')
    command(tmp_path, "cut", "--shard_tokens", "300")
    with pytest.raises(UserError, match="cut-00001.bin exists, made from other inputs"):
        main([str(tmp_path / "other.jsonl"), "--output", str(tmp_path / "cut"), "--tokenizer", "bytes"])
