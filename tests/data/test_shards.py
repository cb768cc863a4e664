"""Token files in shards: the same batches as of one file, and a set that is never half old and half new."""

import json
import os
from dataclasses import replace

import pytest
import torch

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.binidx import BinidxDataset, open_dataset
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.recorded import default_mask
from rwkv_peft.data.sources import build_samples
from rwkv_peft.training.saving.resume import digest_of_data


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
