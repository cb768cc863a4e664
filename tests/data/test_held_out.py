"""Held-out rows that are training rows, too, and their answers behind other prompts."""

import json

import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data.answer_samples import mismatched_answers, overlap_notes
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.tokenizer import load_tokenizer

ROWS = [{"query": f"Say {n}", "response": f"{n}!"} for n in range(6)]
PAIRS = [{"query": f"Say {n}", "chosen": f"{n}!", "rejected": "no"} for n in range(6)]


def config_of(path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"data_type": "sft", "dataload": "pad", "loss_mask": "file", "ctx_len": 64} | settings
    return DataConfig(path=str(path), tokenizer="bytes", **config)


def build(path, rows, **settings):
    return build_samples(config_of(path, rows, seed=None, **settings), 257)


@pytest.mark.parametrize(
    "rows, data_type, dataload", [(ROWS, "sft", d) for d in ("pad", "pack")] + [(PAIRS, "pairs", "pack")]
)
def test_rows_that_two_files_share_are_counted(tmp_path, rows, data_type, dataload):
    settings = {"data_type": data_type, "dataload": dataload}
    training = build_samples(config_of(tmp_path / "a.jsonl", rows[:4], **settings), 257)
    for held_out, words in ((rows[2:], "2 of 4 held-out rows are training rows too"), (rows[4:], "")):
        config = config_of(tmp_path / f"b{bool(words)}.jsonl", held_out, **settings)
        assert words in "".join(notes := overlap_notes(training, build_samples(config, 257)))
        assert len(notes) == bool(words)


def test_a_row_that_is_there_twice_may_be_on_both_sides_of_a_split(tmp_path):
    training, held_out = split_samples(config_of(tmp_path / "twice.jsonl", ROWS + ROWS), 257, 0.1)
    (note,) = overlap_notes(training, held_out)
    assert note.startswith("note: 1 of 1 held-out row is a training row too")
    training, held_out = split_samples(config_of(tmp_path / "once.jsonl", ROWS), 257, 0.2)
    assert overlap_notes(training, held_out) == []


def test_a_stream_has_no_rows(tmp_path):
    config = config_of(tmp_path / "text.jsonl", [{"text": "one two three " * 20}], dataload="get", ctx_len=16)
    assert overlap_notes(*split_samples(config, 257, 0.2)) == []


def asked(answers):
    return [{"query": f"{number}?", "response": answer} for number, answer in enumerate(answers)]


def test_an_answer_goes_behind_the_next_prompt_that_has_another(tmp_path):
    decode = load_tokenizer("bytes").decode
    found = mismatched_answers(build(tmp_path / "rows.jsonl", asked(["yes", "yes", "no"])))
    texts = [[decode(one[0][0][:-1].tolist()) for one in pair] for pair in found]
    laid_out = "User: {}?\n\nAssistant: {}".format
    due = (((0, "yes"), (2, "yes")), ((1, "yes"), (2, "yes")), ((2, "no"), (0, "no")))
    assert texts == [[laid_out(*one) for one in pair] for pair in due]
    for own, other in found:  # the same tokens count
        counted = [one[0][0][1:][one[0][1]].tolist() for one in (own, other)]
        assert counted[0] == counted[1] and own.count(0) == other.count(0) == len(counted[0])


def test_equal_answers_packed_rows_and_texts_tell_nothing(tmp_path):
    assert mismatched_answers(build(tmp_path / "rows.jsonl", asked(["yes"] * 3))) == []
    assert mismatched_answers(build(tmp_path / "rows.jsonl", asked(["yes", "no"]), dataload="pack")) == []
    assert (
        mismatched_answers(build(tmp_path / "rows.jsonl", [{"text": f"text {n}"} for n in range(3)], loss_mask="none"))
        == []
    )
