"""From people's files to tokens: every row once, mistakes named by line, and a whole set of files, or none."""

import json
import os
from itertools import product

import pytest

from data.documents import texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.encoding import shorten
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.recorded import recorded_of_data, vocabulary_of
from rwkv_peft.data.tokenizer import load_tokenizer


def test_the_mark_that_windows_puts_before_a_text_is_no_part_of_it(preprocess, tmp_path):
    marked = "\ufeffone\ntwo".encode()
    assert texts(preprocess(marked, name="in.txt"))[0][0] == "one\ntwo"
    (tmp_path / "template").write_text("\ufeff{q}", encoding="utf-8")
    row = {"q": "2+2?"}
    assert texts(preprocess([row], "--template", str(tmp_path / "template"))) == [("2+2?", "2+2?")]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "{}\n",
            r"in\.jsonl, line 1: a row has the fields \(none\); known are text.*; name yours, as --fields .*TEXT$",
        ),
        ('{"Frage": "a", "Die Antwort": "b"}\n', "a row has the fields Frage 'a', Die Antwort 'b'; known are"),
        ('{"text": "a"}\n{}\n', r"\n\(--skip_bad_rows leaves such rows out, and counts them\)$"),
        ('{"text": "a"}\n\n{"text": [3]}\n', "line 3: field 'text' holds a list, not text"),
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("[" * 100000 + "\n", r"in\.jsonl begins with \[, .* not JSON"),
        ('[{"text": "a"},\n{"text": "b"},]', r"one list of rows, and is not JSON .*no comma behind the last"),
        ('{"text": "a"},\n', "line 1: not JSON .* one JSON object a line, and no comma behind it"),
        ('"just text"\n', "line 1: a row is a text"),
        (b'{"text": "\xff"}\n', "line 1: not UTF-8 .* convert the file"),
        ('{"text": "\\ud800"}\n', "line 1: text is not Unicode"),
        ('{"messages": []}\n', "line 1: messages must be a list"),
        ('{"messages": [{"role": "alien", "content": "x"}]}\n', "line 1: role 'alien'; known are user"),
        ('{"messages": [{"role": "user"}]}\n', "a turn has the fields role"),
        ('{"text": ""}\n', "no document to write: 1 empty row left out"),
        ("", "no document to write: there is no row"),
    ],
)
def test_bad_rows_are_named_by_line(preprocess, tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        preprocess(content)
    assert not (tmp_path / "out").exists()


def test_other_inputs(preprocess, tmp_path):
    rows = json.dumps([{"text": "a"}, {"text": "b"}])
    for name in ("in.json", "list.jsonl"):
        assert [text for text, _ in texts(preprocess(rows, name=name))] == ["a", "b"]
    assert texts(preprocess("one\ntwo", name="in.txt"))[0][0] == "one\ntwo"
    import gzip

    assert texts(preprocess(gzip.compress(b'{"text": "z"}\n'), name="in.jsonl.gz"))[0][0] == "z"
    for name, content, message in (
        ("in.doc", "a", "inputs are .jsonl"),
        ("in.txt", b"\xff", "not UTF-8"),
        ("in.json", "[1,", "not JSON"),
        ("in.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}', "one row over several lines, .*rows stand a line each"),
        ("in.jsonl", "a,b\n", "not JSON .* the name of a table ends in .csv"),
        ("in.csv", b"PK\3\4", "is a zip file, .* name it .zip, .xlsx or .docx as it is"),
        ("in.json", b'["\xff"]', "not UTF-8, .* convert the file"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess(content, name=name)
    with pytest.raises(UserError, match="no such file"):
        main([str(tmp_path / "nothing.jsonl"), "--output", str(tmp_path / "x")])


def test_rows_are_shown_as_they_are_written(preprocess, capsys):
    turns = [("system", "Be."), ("user", "Hi"), ("assistant", "Yo"), ("user", "So?"), ("assistant", "No")]
    rows = [{"messages": [{"role": role, "content": words} for role, words in turns]}, {"text": "plain"}, {"text": "x"}]
    preprocess(rows, "--show", "2")
    chat = "System: Be.\n\nUser: Hi\n\nAssistant:[[ Yo\n\nUser:]] So?\n\nAssistant:[[ No<end>]]"
    shown = capsys.readouterr().out
    assert f"== document 1: 63 tokens, 14 count\n{chat}\n== document 2: 6 tokens, 6 count\n[[plain<end>]]\n" in shown
    assert "document 3" not in shown


def test_long_rows_are_shown_without_their_middle(preprocess, capsys):
    preprocess([{"query": "a" * 540_000 + "?", "response": "b" * 2000 + "!"}], "--show", "1")
    shown = capsys.readouterr().out
    assert len(shown) < 4000
    assert f"User: {'a' * 494}\n… 539,019 characters are not shown …\n{'a' * 487}?\n\nAssistant:[[ b" in shown
    assert "characters are not shown …\nb" in shown and "b!<end>]]\n" in shown
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(100)]
    preprocess([{"messages": turns}], "--show", "1")
    shown = capsys.readouterr().out
    assert "User: turn 0\n" in shown and "turn 99<end>]]" in shown and "turn 50" not in shown
    assert "\n… 80 pieces are not shown …\n" in shown


def test_the_tokenizer_is_recorded_beside_the_data(preprocess, tmp_path):
    preprocess([{"text": "a"}])
    record = recorded_of_data(tmp_path / "out" / "data")
    assert record == vocabulary_of(load_tokenizer("bytes")) and (record.name, record.size) == ("bytes", 257)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.bin", "data.idx", "data.json"]


def test_the_record_replaces_no_input_and_no_file_of_others(tmp_path):
    rows = tmp_path / "data.json"
    rows.write_text('[{"text": "a"}]')
    for prefix, message in ((tmp_path / "data", "data.json, which is an input"), (tmp_path / "x", "another tool made")):
        (tmp_path / "x.json").write_text("[]")
        with pytest.raises(UserError, match=message):
            main([str(rows), "--output", str(prefix), "--tokenizer", "bytes"])
    assert rows.read_text() == '[{"text": "a"}]'


def test_without_an_end_token(preprocess):
    assert preprocess([{"text": "ab"}], "--no-append_eod")[0].tolist() == [98, 99]


def test_what_is_said(preprocess, capsys):
    preprocess([{"query": "a" * i, "response": "b"} for i in (*range(60), 999)])
    said = capsys.readouterr().out
    assert "61 documents" in said and "count in the loss (" in said
    assert "half of them have at most 51 tokens, 95 % at most 78, the longest has 1,020\n" in said
    assert "a start: --ctx_len 128; 1 document is longer, and cut there\n" in said


def test_shortening_keeps_the_answer():
    for prompt, answer, limit in product(range(1, 6), range(1, 6), range(2, 10)):
        pieces = [(list(range(prompt)), False), (list(range(100, 100 + answer)), True)]
        excess = max(prompt + answer - limit, 0)
        (left, _), (right, _) = shorten(pieces, excess, limit)
        assert len(left) + len(right) == min(prompt + answer, limit)
        assert left == list(range(prompt))[prompt - len(left) :] and len(left) >= 1
        assert right == list(range(100, 100 + len(right)))
        assert len(right) == answer or len(left) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokeniser", "bytes"), "there is no --tokeniser; did you mean --tokenizer"),
        (("--input", "a.jsonl"), "there is no --input here; it is the file's name, without a flag"),
        (("--output-prefix", "a"), "there is no --output-prefix here; it is --output"),
    ],
)
def test_flags_that_are_mistaken_are_told(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main(["in.jsonl", "--output", str(tmp_path / "x"), *flags])


def test_makes_what_another_tool_made(shared_data, tmp_path):
    main([str(shared_data / "binidx" / "demo.jsonl"), "--output", str(tmp_path / "data")])
    ours, theirs = BinidxDataset(tmp_path / "data"), BinidxDataset(shared_data / "binidx" / "demo")
    assert sorted(document.tolist() for document in ours) == sorted(document.tolist() for document in theirs)


def command(folder, *flags):
    return main([str(folder / "in.jsonl"), "--output", str(folder / "out" / "data"), "--tokenizer", "bytes", *flags])


def rows(folder, count=200, word="text"):
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": f"{word} {i:05}"}) + "\n" for i in range(count)))


@pytest.mark.parametrize("before", [False, True])
def test_a_disk_that_refuses_is_told_and_leaves_what_was_there(tmp_path, largest_file, before):
    rows(tmp_path)
    (tmp_path / "out").mkdir()
    if before:
        command(tmp_path)
    earlier = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="cannot write .*file too large.*nothing was changed there"), largest_file(1000):
        command(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == earlier


@pytest.mark.usefixtures("ctrl_c_while_writing")
def test_an_interrupt_leaves_no_folder(tmp_path):
    rows(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_outputs_that_cannot_be_written_are_told_before_the_work(tmp_path):
    rows(tmp_path)
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="cannot write .*a file stands where"):
        command(tmp_path)
    with pytest.raises(UserError, match="--output .*in.bin is the file given as an input"):
        (tmp_path / "in.bin").symlink_to(tmp_path / "in.jsonl")
        main([str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "in"), "--tokenizer", "bytes"])
    assert (tmp_path / "in.jsonl").read_text().startswith('{"text"')


@pytest.mark.parametrize("killed", [".bin", ".json", ".idx"])
def test_a_kill_between_the_names_leaves_no_set_of_two_halves(tmp_path, monkeypatch, killed):
    """There is an older set of the same sizes, which the new index would fit."""
    rows(tmp_path, word="older")
    command(tmp_path)
    rows(tmp_path, word="newer")
    replace = os.replace

    def until(source, target):
        if str(target).endswith(f"data{killed}"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", until)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path)
    with pytest.raises(UserError, match="data.idx: no such file"):
        BinidxDataset(tmp_path / "out" / "data")


def test_a_data_set_of_other_inputs_is_replaced_on_request_alone(tmp_path):
    rows(tmp_path)
    command(tmp_path)
    rows(tmp_path, word="newer")
    command(tmp_path)  # the same inputs, made anew
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    output = ("--output", str(tmp_path / "out" / "data"), "--tokenizer")
    (tmp_path / "other.jsonl").write_text('{"text": "other"}')
    for name, tokenizer in (("other.jsonl", "bytes"), ("in.jsonl", "world")):
        for end in (".bin", ".idx"):
            with pytest.raises(UserError, match=f"out/data{end} exists, made from .*--overwrite"):
                main([str(tmp_path / name), *output, tokenizer])
            (tmp_path / "out" / f"data{end}").rename(tmp_path / f"data{end}")
        for end in (".bin", ".idx"):
            (tmp_path / f"data{end}").rename(tmp_path / "out" / f"data{end}")
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == made
    assert main([str(tmp_path / "other.jsonl"), *output, "bytes", "--overwrite"]) == 0
    assert len(BinidxDataset(tmp_path / "out" / "data")) == 1


def test_a_data_set_of_another_tool_is_replaced_on_request_alone(tmp_path):
    rows(tmp_path)
    command(tmp_path)
    (tmp_path / "out" / "data.json").unlink()
    with pytest.raises(UserError, match="data.bin exists, made from"):
        command(tmp_path)
    assert command(tmp_path, "--overwrite") == 0


@pytest.fixture
def small(tmp_path):
    """Rows, some of them repeated, and a text."""
    content = [{"query": str(n % 13), "response": "r" * (n % 13), "weight": 1 + n % 2} for n in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "text.txt").write_text("".join(f"line {n}\n" for n in range(600)))
    return tmp_path


def command_of(folder, name, *flags):
    inputs = [str(folder / file) for file in ("in.jsonl", "text.txt")]
    return main([*inputs, "--output", str(folder / name), *flags])


def test_a_refusal_leaves_nothing(small):
    (small / "in.jsonl").write_text((small / "in.jsonl").read_text() + "no JSON\n")
    with pytest.raises(UserError, match="line 61: not JSON"):
        command_of(small, "data")
    assert {path.name for path in small.iterdir()} == {"in.jsonl", "text.txt"}


def test_repeated_rows_are_counted_or_dropped(small, capfd):
    command_of(small, "all")
    assert "note: 47 rows the same as an earlier one" in capfd.readouterr().out
    command_of(small, "first", "--drop_duplicates")
    out = capfd.readouterr().out
    assert "47 rows the same as an earlier one, dropped" in out and "note: 47" not in out
    kept, everything = BinidxDataset(small / "first"), BinidxDataset(small / "all")
    assert len(everything) == 61 and len(kept) == 14  # weights apart, 13 rows and the text
    due = [*range(13), 60]
    assert [document.tobytes() for document in kept] == [everything[number].tobytes() for number in due]
    for number, place in enumerate(due):
        assert kept.weights[number] == everything.weights[place]
