"""From people's files to tokens: every row once, roles as masks, mistakes named by line."""

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, product
from pathlib import Path

import pytest

from data.documents import texts
from rwkv_peft.config import DataConfig
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.encode_settings import EncodeSettings
from rwkv_peft.data.encoding import shorten
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.recorded import recorded_of_data, vocabulary_of
from rwkv_peft.data.row_forms import pair
from rwkv_peft.data.rows import Chunk, read_chunks
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.templates import TEMPLATES, segments
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.workers import encode_all
from rwkv_peft.errors import UserError


@pytest.mark.parametrize(
    "row, text, counted",
    [
        ({"text": "héllo\n"}, "héllo\n", "héllo\n"),
        ({"query": "2+2?", "response": "4"}, "User: 2+2?\n\nAssistant: 4", " 4"),
        ({"question": "2+2?", "answer": "4"}, "User: 2+2?\n\nAssistant: 4", " 4"),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, "Instruction: Add\n\nInput: 2 2\n\nResponse: 4", " 4"),
        ({"instruction": "Sing", "input": "", "output": "la"}, "Instruction: Sing\n\nResponse: la", " la"),
        ({"prompt": "a", "completion": "b"}, "ab", "b"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be."},
                    {"role": "user", "content": "Hi "},
                    {"role": "assistant", "content": "Yo"},
                    {"role": "user", "content": "So?"},
                    {"role": "assistant", "content": "No"},
                ]
            },
            "System: Be.\n\nUser: Hi\n\nAssistant: Yo\n\nUser: So?\n\nAssistant: No",
            " Yo\n\nUser: No",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            "User: Hi\n\nAssistant: Yo",
            " Yo",
        ),
    ],
)
def test_every_form_of_row(preprocess, row, text, counted):
    dataset = preprocess([row])
    assert texts(dataset) == [(text, counted)]
    assert dataset[0][-1] == 0  # the end token
    if dataset.mask is not None:
        assert dataset.mask[-1] == 1  # which the model learns to write


def test_the_mark_that_windows_puts_before_a_text_is_no_part_of_it(preprocess, tmp_path):
    marked = "\ufeffone\ntwo".encode()
    assert texts(preprocess(marked, name="in.txt"))[0][0] == "one\ntwo"
    (tmp_path / "template").write_text("\ufeff{q}", encoding="utf-8")
    row = {"q": "2+2?"}
    assert texts(preprocess([row], "--template", str(tmp_path / "template"))) == [("2+2?", "2+2?")]


def test_fields_and_templates_name_others(preprocess, tmp_path):
    row = {"q": "2+2?", "a": "4"}
    assert texts(preprocess([row], "--fields", "q", "a")) == [("User: 2+2?\n\nAssistant: 4", " 4")]
    assert texts(preprocess([row], "--fields", "a")) == [("4", "4")]
    (tmp_path / "template").write_text("Q: {q}\nA:[[ {a}]] end\n")
    dataset = preprocess([row], "--template", str(tmp_path / "template"))
    assert texts(dataset) == [("Q: 2+2?\nA: 4 end", " 4")]
    (tmp_path / "template").write_text("{q}:\n\n")  # of which the last ends the file's line
    assert texts(preprocess([row], "--template", str(tmp_path / "template"))) == [("2+2?:\n", "2+2?:\n")]
    (tmp_path / "template").write_text("{q} {a}")
    assert texts(preprocess([row], "--template", str(tmp_path / "template"))) == [("2+2? 4", "2+2? 4")]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Hi?", "response": "Yo"},
        {"instruction": "Hi?", "output": "Yo"},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yo"}]},
    ],
)
def test_a_system_text_beside_a_question_stands_before_it(row):
    plain = segments(row)
    assert segments(row | {"system": "Be. "}) == [("System: Be.\n\n", False), *plain]
    assert segments(row | {"system": ""}) == segments(row | {"system": None}) == plain
    with pytest.raises(UserError, match="field 'system' holds list, not text"):
        segments(row | {"system": ["Be."]})


def test_a_prompt_as_it_stands_has_no_place_for_a_system_text(preprocess):
    row = {"prompt": "Hi?", "completion": " Yo", "system": "Be."}
    with pytest.raises(UserError, match="a system text beside its prompt.*; name others with --fields"):
        preprocess([row])
    assert "System: Be.\n\nUser: Hi?" in texts(preprocess([row], "--fields", "prompt", "completion"))[0][0]


@pytest.mark.parametrize(
    "row, name",
    [
        ({"query": "Hi?", "response": "Yo", "history": [["A", "B"]]}, "history"),
        ({"instruction": "Hi?", "output": "Yo", "history": [["A", "B"]]}, "history"),
        ({"prompt": "Hi?", "completion": "Yo", "tools": [{"name": "weather"}]}, "tools"),
        ({"prompt": "Hi?", "completion": "Yo", "functions": "[1]"}, "functions"),
        ({"query": "Hi?", "response": "Yo", "tool_calls": "[1]"}, "tool_calls"),
        ({"prompt": "Hi?", "chosen": "Yo", "rejected": "No", "history": [["A", "B"]]}, "history"),
    ],
)
def test_what_no_layout_has_a_place_for_is_refused_and_not_lost(row, name):
    laid_out = pair if "chosen" in row else segments
    with pytest.raises(UserError, match=f"field '{name}' has no place in this layout"):
        laid_out(row)


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_a_field_that_holds_nothing_is_in_nobodys_way(nothing):
    row = {"query": "Hi?", "response": "Yo"}
    assert segments(row | {"history": nothing, "tools": nothing}) == segments(row)
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yo"}]
    assert segments({"messages": [turn | {"tool_calls": nothing} for turn in turns]}) == segments({"messages": turns})


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi?", "input": "", "output": "Yo"},
        {"query": "Hi?", "response": "Yo"},
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yo"}]},
    ],
)
def test_a_text_beside_answers_is_taken_where_it_is_named_and_else_refused(preprocess, row):
    with pytest.raises(UserError, match="a row has a text, which counts as a whole, and .*; name others with --fields"):
        preprocess([row | {"text": "Be. Hi? Yo"}])
    assert texts(preprocess([row | {"text": "Be. Hi? Yo"}], "--fields", "text")) == [("Be. Hi? Yo", "Be. Hi? Yo")]
    assert segments(row | {"text": ""}) == segments(row | {"text": None}) == segments(row)


def test_layouts_have_names(preprocess):
    row = {"query": "2+2?", "response": "4"}
    assert texts(preprocess([row], "--template", "chat")) == texts(preprocess([row]))
    with pytest.raises(UserError, match="chat, question, instruction"):
        preprocess([row], "--template", "chatty")


@pytest.mark.parametrize("text", ["no field", "{a} [[", "{a} ]] [[", "[[ {a} [[ ]] ]]"])
def test_bad_templates_are_named(preprocess, tmp_path, text):
    (tmp_path / "template").write_text(text)
    with pytest.raises(UserError, match="template"):
        preprocess([{"a": "b"}], "--template", str(tmp_path / "template"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}\n", r"in\.jsonl, line 1: a row has the fields \(none\); known are text.*; name others with --fields\n"),
        ("{}\n", r"\n\(--skip_bad_rows leaves such rows out, and counts them\)"),
        ('{"text": "a"}\n\n{"text": 3}\n', "line 3: field 'text' holds int, not text"),
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("[" * 100000 + "\n", r"in\.jsonl begins with \[, .* not JSON"),
        ('[{"text": "a"},\n{"text": "b"},]', r"one list of rows, and is not JSON .*no\s+comma stands behind the last"),
        ('{"text": "a"},\n', "line 1: not JSON .* one JSON object a line, and no comma behind it"),
        ('"just text"\n', "line 1: a row is str"),
        (b'{"text": "\xff"}\n', "line 1: not UTF-8 .* convert the file"),
        ('{"text": "\\ud800"}\n', "line 1: text is not Unicode"),
        ('{"messages": []}\n', "line 1: messages must be a list"),
        ('{"messages": [{"role": "alien", "content": "x"}]}\n', "line 1: role 'alien'; known are user"),
        ('{"messages": [{"role": "user"}]}\n', "a turn has the fields role"),
        ('{"text": ""}\n', "no document to write: 1 empty rows left out"),
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
        ("in.json", b'["\xff"]', "not UTF-8 .* convert the file"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess(content, name=name)
    with pytest.raises(UserError, match="no such file"):
        main([str(tmp_path / "nothing.jsonl"), "--output", str(tmp_path / "x")])


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"query": ["a", "b"], "response": ["c", "d"]}), tmp_path / "in.parquet")
    main([str(tmp_path / "in.parquet"), "--output", str(tmp_path / "data"), "--tokenizer", "bytes"])
    assert [counted for _, counted in texts(BinidxDataset(tmp_path / "data"))] == [" c", " d"]
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a parquet file"):
        main([str(tmp_path / "bad.parquet"), "--output", str(tmp_path / "bad")])


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


def test_shuffle_and_repeat(preprocess):
    rows = [{"query": str(i), "response": str(i)} for i in range(20)]
    plain = texts(preprocess(rows))
    shuffled = texts(preprocess(rows, "--shuffle", "1"))
    assert shuffled != plain and sorted(shuffled) == sorted(plain)
    assert texts(preprocess(rows, "--shuffle", "1")) == shuffled != texts(preprocess(rows, "--shuffle", "2"))
    thrice = texts(preprocess(rows, "--shuffle", "1", "--repeat", "3"))
    assert [sorted(thrice[i : i + 20]) for i in (0, 20, 40)] == [sorted(plain)] * 3
    assert thrice[:20] != thrice[20:40]


def test_rows_are_shown_as_they_are_written(preprocess, capsys, monkeypatch):
    turns = [("system", "Be."), ("user", "Hi"), ("assistant", "Yo"), ("user", "So?"), ("assistant", "No")]
    rows = [{"messages": [{"role": role, "content": words} for role, words in turns]}, {"text": "plain"}, {"text": "x"}]
    preprocess(rows, "--show", "2")
    chat = "System: Be.\n\nUser: Hi\n\nAssistant:[[ Yo\n\nUser:]] So?\n\nAssistant:[[ No<end>]]"
    shown = capsys.readouterr().out
    assert f"== document 1: 63 tokens, 14 count\n{chat}\n== document 2: 6 tokens, 6 count\n[[plain<end>]]\n" in shown
    assert "document 3" not in shown
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    preprocess(rows, "--show", "1")
    assert "Assistant:\033[1;32m No<end>\033[0m\n" in capsys.readouterr().out
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as terminal:
            terminal.setenv(name, value)
            preprocess(rows, "--show", "1")
            assert "Assistant:[[ No<end>]]\n" in capsys.readouterr().out


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


def test_the_documented_layouts_are_those_of_the_code():
    page = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
    for name, text in TEMPLATES.items():
        assert f"| `{name}` | `{text}` |".replace("\n", "⏎") in page
    turns = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6")]
    parts = segments({"messages": [{"role": role, "content": words} for role, words in turns]})
    runs = [("".join(text for text, _ in run), counts) for counts, run in groupby(parts, key=lambda part: part[1])]
    text = "".join(f"[[{text}]]" if counts else text for text, counts in runs)
    assert f"```\n{text[:-2]}<end>]]\n```" in page


def test_the_tokenizer_is_recorded_beside_the_data(preprocess, tmp_path):
    preprocess([{"text": "a"}])
    record = recorded_of_data(tmp_path / "out" / "data")
    assert record == vocabulary_of(load_tokenizer("bytes")) and (record.name, record.size) == ("bytes", 257)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.bin", "data.idx", "data.json"]


@pytest.mark.parametrize("text", [b"", b'{"vocabulary": {"na', b"\xff"])
def test_a_record_that_cannot_be_read_is_not_taken_for_none(preprocess, tmp_path, text):
    preprocess([{"text": "a"}])
    (tmp_path / "out" / "data.json").write_bytes(text)
    config = DataConfig(path=str(tmp_path / "out" / "data"), ctx_len=1)
    with pytest.raises(UserError, match="data.json should name the tokenizer .* and is not JSON"):
        build_samples(config, 257)
    rows = 9 * '{"text": "b"}\n'
    for others in ('{"of": "another tool"}', rows, json.dumps([{"text": 10**6 * "a"}])):
        (tmp_path / "out" / "data.json").write_text(others)
        assert build_samples(config, 257).vocabulary is None


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
    preprocess([{"query": "a" * i, "response": "b"} for i in range(60)])
    said = capsys.readouterr().out
    for words in (
        "60 documents",
        "count in the loss (",
        "tokens a document",
        "up to",
        "--ctx_len 128",
        "--magic_prime",
    ):
        assert words in said


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
        (("--repeat", "0"), "--repeat: 0 is below 1"),
        (("--workers", "-2"), "--workers: -2 is below 1"),
        (("--shuffle", "x"), "--shuffle: 'x' is not a whole number"),
    ],
)
def test_flags_that_are_mistaken_are_told(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main(["in.jsonl", "--output", str(tmp_path / "x"), *flags])


def test_the_command_ends_a_mistake_with_one_line(tmp_path):
    flags = [str(tmp_path / "no.jsonl"), "--tokenizer", "bytes", "--output", str(tmp_path / "x")]
    result = subprocess.run([sys.executable, "-m", "rwkv_peft", "preprocess", *flags], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "no such file" in result.stderr


def test_makes_what_another_tool_made(shared_data, tmp_path):
    main([str(shared_data / "binidx" / "demo.jsonl"), "--output", str(tmp_path / "data")])
    ours, theirs = BinidxDataset(tmp_path / "data"), BinidxDataset(shared_data / "binidx" / "demo")
    assert sorted(document.tolist() for document in ours) == sorted(document.tolist() for document in theirs)
