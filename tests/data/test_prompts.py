"""Rows as prompts: their layouts end where an answer opens, and each sample knows its row."""

import json

import pytest

from data.documents import EARLIER, GOOD, USER, text
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.row_forms import opened
from rwkv_peft.data.show import show_samples
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.templates import segments
from rwkv_peft.data.tokenizer import BytesTokenizer

FORMS = [
    {"query": "Hi?", "response": "Yes."},
    {"question": "Hi?", "answer": "Yes.", "system": "Be brief."},
    {"instruction": "Hi?", "input": "x", "output": "Yes."},
    {"prompt": "Q: Hi?\nA:", "completion": " Yes."},
    {"messages": [USER, GOOD]},
    {"messages": [*EARLIER, USER, GOOD], "system": "Be brief."},
    {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
]


def unanswered(row):
    """A row without its answer."""
    talk = next((name for name in ("messages", "conversations") if name in row), None)
    if talk:
        return row | {talk: row[talk][:-1]}
    return {name: value for name, value in row.items() if name not in ("response", "answer", "output", "completion")}


@pytest.mark.parametrize("think", ["", "off"])
@pytest.mark.parametrize("row", FORMS, ids=lambda row: "-".join(row))
def test_a_prompt_is_what_a_row_of_its_form_has_before_its_answer(row, think):
    if think and ("prompt" in row or "instruction" in row):
        return  # have no opening of an answer
    parts = segments(row, think)
    begin = max(place for place in range(1, len(parts)) if parts[place][1] and not parts[place - 1][1])
    assert text(parts[begin:]).lstrip(">\n ").startswith("Yes.")
    for given in (row, unanswered(row)):
        found = opened(given, think=think)
        assert text(found) == text(parts[:begin]) and not any(counts for _, counts in found)


def test_other_forms():
    assert text(opened({"prompt": [USER]})) == "User: Hi?\n\nAssistant:"
    assert text(opened({"problem": "Hi?", "answer": "4"}, ("problem",))) == "User: Hi?\n\nAssistant:"
    assert text(opened({"question": "Hi?"}, think="on")) == "User: Hi?\n\nAssistant: <think"
    assert text(opened({"prompt": "Hi?", "answer": 4, "text": "not read"})) == "Hi?"


@pytest.mark.parametrize(
    "row, names, words",
    [
        ("Hi?", (), "a row is str, not an object with fields: a prompt, query"),
        ({"problem": "Hi?"}, (), "the fields problem 'Hi.'; prompts are a prompt, query, question"),
        ({"question": "Hi?"}, ("problem",), "field 'problem' is missing; the row has question"),
        ({"prompt": " "}, (), "the prompt is empty; write one"),
        ({"prompt": {}}, (), "field 'prompt' holds dict, not text"),
    ],
)
def test_rows_that_hold_no_prompt(row, names, words):
    with pytest.raises(UserError, match=words):
        opened(row, names)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(rows, **more):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = {"ctx_len": 64, "max_completion_length": 16, "seed": 1} | more
        path = str(tmp_path / "rows.jsonl")
        return DataConfig(path, data_type="prompts", tokenizer="bytes", dataload="pack", loss_mask="file", **more)

    return write


def test_samples_know_their_rows(config):
    """Also if rows are left out, after a split, and in later epochs."""
    rows = [{"prompt": f"{n}:", "answer": n, "word": "ä"} for n in range(9)] + [{"question": ["bad"]}, {"prompt": ""}]
    settings = config([rows[9], *rows[:4], rows[10], *rows[4:9]], skip_bad_rows=True)
    tokenizer = BytesTokenizer()
    samples = build_samples(settings, 257)
    assert samples.kind == "prompt" and len(samples) == 9 and all(map(samples.count, range(9)))
    assert any("2 bad rows left out" in note for note in samples.notes)
    for part in (samples, *split_samples(settings, 257, 0.3)):
        for n in range(2 * len(part)):
            row = part.row(n)
            assert row in rows and tokenizer.decode(part.prompt(n)) == row["prompt"]
    assert {samples.row(n)["answer"] for n in range(9)} == set(range(9))
    assert "0 count" in show_samples(samples, 1, tokenizer)
    with pytest.raises(UserError, match="line 1: field .question. holds list.*\n.*line 2: the prompt is empty"):
        build_samples(config([rows[9], rows[10]]), 257)


def test_a_long_prompt_leaves_room_for_an_answer(config):
    rows = [{"prompt": "0123456789" * 5 + f"{n}:"} for n in range(2)] + [{"prompt": "2:"}]
    samples = build_samples(config(rows), 257)
    assert sorted(len(samples.prompt(n)) for n in range(3)) == [2, 48, 48]
    assert {BytesTokenizer().decode(samples.prompt(n))[-2:] for n in range(3)} == {"0:", "1:", "2:"}
    assert any("2 rows too long, shortened" in note for note in samples.notes)
    assert len(build_samples(config(rows, sft_long="skip"), 257)) == 1
