"""Rows of questions and answers train directly; they are tokenized once, and only answers count."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

import rwkv_peft.data.sources as sft
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.row_settings import refuse_hub_name
from rwkv_peft.data.sources import build_samples, prepare_sft
from rwkv_peft.data.tokenizer import load_tokenizer


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(rows, **settings) -> a DataConfig over a .jsonl of them, byte tokens, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(rows, **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults = dict(data_type="sft", tokenizer="bytes", dataload="pad", loss_mask="file", ctx_len=64)
        return DataConfig(path=str(tmp_path / "rows.jsonl"), **{**defaults, **settings})

    return make


def samples_of(config):
    samples, tokenizer = build_samples(config, 257), load_tokenizer("bytes")
    result = []
    for n in range(len(samples)):
        tokens, mask = samples[n]
        result.append((tokenizer.decode(tokens.tolist()), tokenizer.decode(tokens[1:][mask].tolist())))
    return sorted(result), samples.notes


ROWS = [{"query": f"{i}?", "response": f"{i}!"} for i in range(10)]


def test_answers_alone_count(config):
    assert samples_of(config(ROWS))[0] == [(f"User: {i}?\n\nAssistant: {i}!", f" {i}!") for i in range(10)]


def test_long_prompts_lose_their_front_and_are_counted(config):
    rows = [{"prompt": "x" * 100, "completion": "yes"}, {"prompt": "a", "completion": "no"}]
    read, notes = samples_of(config(rows, ctx_len=9))
    assert read == [("ano", "no"), ("xxxxxxyes", "yes")]
    assert "1 row too long, shortened" in notes
    read, notes = samples_of(config(rows, ctx_len=9, sft_long="skip"))
    assert read == [("ano", "no")]
    assert "1 row too long, left out" in notes


def test_a_long_text_is_read_whole(config, tmp_path):
    """It becomes rows of which each begins with the last token of the one before."""
    (tmp_path / "story.txt").write_text("abcdefg\nhi")
    read, notes = samples_of(replace(config([]), path=str(tmp_path / "story.txt"), ctx_len=4))
    assert read == [("abcde", "bcde"), ("efg\nh", "fg\nh"), ("hi", "i")]
    assert "1 text longer than a row, cut into several" in notes


def test_rows_are_tokenized_once_for_each_content_and_setting(config, monkeypatch):
    calls, plain = [], sft.write
    monkeypatch.setattr(sft, "write", lambda *args, **settings: calls.append(1) or plain(*args, **settings))
    first = config(ROWS)
    prefix, notes = prepare_sft(first)
    assert prepare_sft(first) == (prefix, notes) and len(calls) == 1
    others = dict(
        ctx_len=32, tokenizer="world", sft_split="train[:3]", sft_long="skip", sft_think="off", clean_turns=False
    )
    for name, value in others.items():
        assert prepare_sft(replace(first, **{name: value}))[0] != prefix
    assert prepare_sft(config(ROWS[:5]))[0] != prefix  # other content in the same file
    assert len(calls) == 8


@pytest.mark.parametrize("gone", [(".json", ".bin"), (".idx",), (".mask",)])
def test_what_is_left_of_a_set_in_the_cache_is_made_again(config, gone):
    made = config(ROWS)
    expected, prefix = samples_of(made)[0], prepare_sft(made)[0]
    for end in gone:
        Path(prefix).with_suffix(end).unlink()
    assert samples_of(made)[0] == expected


@pytest.mark.parametrize("end", [".json", ".bin", ".mask"])
def test_a_file_of_the_cache_that_was_cut_short_is_made_again(config, end):
    made = config(ROWS)
    expected, prefix = samples_of(made)[0], prepare_sft(made)[0]
    Path(prefix).with_suffix(end).write_bytes(b"")
    assert samples_of(made)[0] == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(sft_field=("query", "answer")),
            r"line 1: field 'answer' is missing; the row has query '0\?', response '0!'",
        ),
        (dict(sft_field=("a", "b", "c", "d")), "--sft_field a b c d"),
        (dict(sft_split="train[3"), "split 'train"),
        (dict(sft_split="train[50:]"), r"no document to write: there is no row within train\[50:\]"),
        (dict(path="missing.jsonl"), "^missing.jsonl: no such file"),
    ],
)
def test_mistakes_are_named(config, settings, message):
    with pytest.raises(UserError, match=message):
        build_samples(replace(config(ROWS), **settings), 257)


def test_a_file_that_will_be_written_is_no_name_on_the_hub(config):
    """`rwkv-peft study --output out` names out/questions.jsonl before it makes the folder."""
    refuse_hub_name(replace(config(ROWS), path="absent/questions.jsonl"))
    with pytest.raises(UserError, match="hf download meta-math/MetaMathQA"):
        refuse_hub_name(replace(config(ROWS), path="meta-math/MetaMathQA"))


def test_a_folder_that_datasets_wrote(config, tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {name: [row[name] for row in ROWS] for name in ("query", "response")}
    whole = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "folder"))
    made = replace(config(ROWS), path=str(tmp_path / "folder"))
    assert len(samples_of(made)[0]) == 10
    assert samples_of(replace(made, sft_split="test"))[0] == [("User: 0?\n\nAssistant: 0!", " 0!")]
    with pytest.raises(UserError, match="no split 'other'; it has train, test"):
        build_samples(replace(made, sft_split="other"), 257)


def test_a_cache_that_cannot_be_written_names_the_variable(config, tmp_path):
    rows = config(ROWS)
    (tmp_path / "cache").touch()
    with pytest.raises(
        UserError, match="cache.* cannot be written .*Not a directory.* kept there, and XDG_CACHE_HOME names another"
    ):
        prepare_sft(rows)


def test_a_disk_of_the_cache_that_is_full_names_the_variable(config, monkeypatch):
    rows = config(ROWS)

    def full(writer, *files):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rwkv_peft.data.token_file_writer.TokenFileWriter.complete", full)
    with pytest.raises(UserError, match="disk is full; .* kept there, and XDG_CACHE_HOME names another place"):
        prepare_sft(rows)
