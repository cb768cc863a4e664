"""Held-out rows that are training rows too are told, because their loss falls as they are learned by heart."""

import json

import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data.leaks import leaked
from rwkv_peft.data.sources import build_samples, split_samples

ROWS = [{"query": f"Say {n}", "response": f"{n}!"} for n in range(6)]
PAIRS = [{"query": f"Say {n}", "chosen": f"{n}!", "rejected": "no"} for n in range(6)]


def samples_of(path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"data_type": "sft", "dataload": "pad", "loss_mask": "file", "ctx_len": 64} | settings
    return DataConfig(path=str(path), tokenizer="bytes", **config)


@pytest.mark.parametrize(
    "rows, data_type, dataload", [(ROWS, "sft", d) for d in ("pad", "pack")] + [(PAIRS, "pairs", "pack")]
)
def test_rows_that_two_files_share_are_counted(tmp_path, rows, data_type, dataload):
    settings = {"data_type": data_type, "dataload": dataload}
    training = build_samples(samples_of(tmp_path / "a.jsonl", rows[:4], **settings), 257)
    for held_out, words in ((rows[2:], "2 of 4 held-out rows are training rows too"), (rows[4:], "")):
        config = samples_of(tmp_path / f"b{bool(words)}.jsonl", held_out, **settings)
        assert words in "".join(notes := leaked(training, build_samples(config, 257)))
        assert len(notes) == bool(words)


def test_a_row_that_is_there_twice_may_be_on_both_sides_of_a_split(tmp_path):
    training, held_out = split_samples(samples_of(tmp_path / "twice.jsonl", ROWS + ROWS), 257, 0.1)
    (note,) = leaked(training, held_out)
    assert note.startswith("note: 1 of 1 held-out row is a training row too")
    training, held_out = split_samples(samples_of(tmp_path / "once.jsonl", ROWS), 257, 0.2)
    assert leaked(training, held_out) == []


def test_a_stream_has_no_rows(tmp_path):
    config = samples_of(tmp_path / "text.jsonl", [{"text": "one two three " * 20}], dataload="get", ctx_len=16)
    assert leaked(*split_samples(config, 257, 0.2)) == []
