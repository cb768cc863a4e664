"""Rows tokenized while they are read: each once an epoch, the same after a resumption, mistakes told by row."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from fuzz.foreign import save_folder
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.training.flags.request import parse_flags

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

ROWS = [{"question": f"q{n}", "answer": "a" * (1 + n % 17), "weight": 1 + (n > 40)} for n in range(70)]


def save_parquet(folder, rows=ROWS, group=8):
    """Two files, as load_dataset finds them, in groups of rows."""
    (folder / "data").mkdir(parents=True)
    for number, part in enumerate((rows[:33], rows[33:])):
        path = folder / "data" / f"train-0000{number}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(part), path, row_group_size=group)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    (folder / "arrow").mkdir()
    table = pyarrow.concat_tables([pyarrow.Table.from_pylist(ROWS[n : n + 8]) for n in range(0, len(ROWS), 8)])
    return {"parquet": save_parquet(folder / "parquet"), "arrow": save_folder(folder / "arrow" / "rows", table)}


def config_of(path, **settings):
    settings = {"ctx_len": 40, "dataload": "pad", "loss_mask": "file", "stream": 20, "micro_bsz": 2} | settings
    return DataConfig(str(path), data_type="sft", tokenizer="bytes", **settings)


def document(sample):
    tokens, mask = sample
    return tokens.numpy().tobytes(), mask.numpy().tobytes()


def texts(sample):
    """The text of a sample, and that of the targets that count."""
    tokens, mask = sample
    return tuple(load_tokenizer("bytes").decode(part.tolist()) for part in (tokens, tokens[1:][mask != 0]))


def number_of(text):
    return int(text.partition("q")[2].partition("\n")[0])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("micro_bsz", [1, 4])
def test_each_row_comes_once_an_epoch_as_it_does_from_the_cache(folders, kind, micro_bsz, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = config_of(folders[kind], micro_bsz=micro_bsz)
    samples, cached = build_samples(config, 257), build_samples(replace(config, stream=0), 257)
    assert len(samples) == len(cached) == 70 and len(list(tmp_path.rglob("*.bin"))) == 1
    due = Counter((texts(cached[n]), cached.count(n)) for n in range(70))
    epochs = [[(texts(samples[n]), samples.count(n)) for n in range(70 * epoch, 70 * epoch + 70)] for epoch in range(3)]
    assert all(Counter(epoch) == due for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    order = [number_of(text) for (text, _), _ in epochs[0]]
    assert any(abs(a - b) > 16 for a, b in zip(order, order[1:])) and len({n // 8 for n in order[:24]}) < 6


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_sample_depends_on_its_number_alone(folders, kind):
    samples = build_samples(config_of(folders[kind]), 257)
    for n in (69, 0, 33, 10**12, 71, 34):
        assert document(samples[n]) == document(build_samples(config_of(folders[kind]), 257)[n])
    whole = TrainBatches(samples, 2, accumulate=3)
    parts = list(islice(whole, 60))
    resumed = TrainBatches(build_samples(config_of(folders[kind]), 257), 2, accumulate=3, samples_seen=5 * 6)
    for left, right in zip(parts[15:], islice(resumed, 45)):
        assert all(torch.equal(left[name], right[name]) for name in ("tokens", "targets", "mask"))
        assert left["step_count"] == right["step_count"]


def test_without_shuffling_rows_come_in_their_order(folders):
    samples = build_samples(config_of(folders["parquet"], seed=None), 257)
    assert [number_of(texts(samples[n])[0]) for n in range(70)] == list(range(70))


def test_bad_rows_are_told_by_file_and_row_or_count_nothing(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[2] = {"question": "q", "answer": None, "weight": 1}
    rows[50] = {"question": "q", "answer": "a", "weight": -1}
    folder = save_parquet(tmp_path / "rows", rows)
    with pytest.raises(UserError) as error:
        samples = build_samples(config_of(folder, seed=None), 257)
        list(islice(TrainBatches(samples, 2, read_ahead=0), 40))
    assert "train-00000-of-00002.parquet, row 3: " in str(error.value) and "--skip_bad_rows" in str(error.value)
    samples = build_samples(config_of(folder, seed=None, skip_bad_rows=True), 257)
    counts = [samples.count(n) for n in range(70)]
    assert [n for n, count in enumerate(counts) if not count] == [2, 50] and "1 bad row left out" in samples.notes[2]


@pytest.mark.parametrize(
    "more, words",
    [
        (("--data_type", "pairs"), "--stream 9 needs --data_type sft: it reads rows of answers or of text"),
        (("--data_type", "sft", "--val_split", "0.1"), "--stream 9 does not go with --val_split 0.1"),
        (("--data_type", "sft", "--dataload", "pack"), "--stream 9 does not go with --dataload pack"),
        (("--data_type", "sft", "--data_file", "a", "b"), "--stream 9 does not go with several --data_file"),
        (("--data_type", "sft", "--loss_mask", "qa", "--mask_id", "1"), "--stream 9 does not go with --loss_mask qa"),
    ],
)
def test_what_needs_all_rows_before_is_refused(more, words):
    with pytest.raises(UserError) as error:
        parse_flags(["--data_file", "x", "--load_model", "y", "--stream", "9", *more])
    assert words in str(error.value)


def test_other_files_are_refused(tmp_path, folders):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="rows.jsonl: --stream reads .parquet files, and folders that datasets"):
        build_samples(config_of(tmp_path / "rows.jsonl"), 257)
    with pytest.raises(UserError, match=r"--sft_split train\[:5\]: --stream reads whole splits"):
        build_samples(config_of(folders["parquet"], sft_split="train[:5]"), 257)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:0]), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="none.parquet holds no row"):
        build_samples(config_of(tmp_path / "none.parquet"), 257)
