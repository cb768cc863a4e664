"""Rows of files, folders, parquet and datasets come as they were written, or a part of them, and nothing else."""

import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data.documents import texts
from fuzz.foreign import save_folder
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.checkpoints.tensors import read_pth
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError, exit_on_user_error
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.layouts import read_template
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.rows import read_rows
from rwkv_peft.data.texts import BYTES
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.plots import read_metrics
from rwkv_peft.tools.ui.preview import preview


@pytest.mark.parametrize(
    "split, expected",
    [
        ("train[:3]", range(3)),
        ("train[3:5]", range(3, 5)),
        ("[2:]", range(2, 10)),
        ("train", range(10)),
        ("train[4:4]", ()),
    ],
)
def test_split_selects_rows(tmp_path, split, expected):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{i}\n" for i in range(10)))
    due = [(f"{path}, line {number + 1}", f"{number}\n".encode()) for number in expected]
    assert list(read_rows(path, split)) == due


@pytest.mark.parametrize("split", ["train[oops]", "train[-2:]", "[:10%]"])
def test_a_split_that_is_none_is_named(tmp_path, split):
    (tmp_path / "in.jsonl").write_text("1\n")
    with pytest.raises(UserError, match=r"write train, train\[:1000\]"):
        list(read_rows(tmp_path / "in.jsonl", split))


def rows(*words):
    return [{"query": word, "response": word.upper()} for word in words]


def lines(*words):
    return "".join(json.dumps(row) + "\n" for row in rows(*words))


def asked(dataset):
    return [text.removeprefix("User: ").partition("\n")[0] for text, _ in texts(dataset)]


@pytest.mark.parametrize(
    "content, name",
    [
        ("query,response\na,A\nb,B\n", "in.csv"),
        ('\ufeffquery, response \r\n"a",A\r\n\r\nb,"B"\r\n', "in.csv"),
        ("query;response;more, or not\na;A;,\nb;B;,\n", "in.csv"),
        ("query\tresponse\na\tA\nb\tB", "in.tsv"),
    ],
)
def test_csv(preprocess, content, name):
    dataset = preprocess(content, name=name)
    assert asked(dataset) == ["a", "b"] and [counted for _, counted in texts(dataset)] == [" A", " B"]


def test_cells_in_quotes(preprocess):
    dataset = preprocess('query,response\n"a, ""b""\nc",A\n', name="in.csv")
    assert texts(dataset) == [('User: a, "b"\nc\n\nAssistant: A', " A")]


def test_a_long_cell(preprocess):
    assert len(preprocess(f"text\n{'a' * 200_000}\n", name="in.csv")[0]) == 200_001


@pytest.mark.parametrize(
    "content, message",
    [
        ("query,response\na,A,x\n", "in.csv, row 1: a row has 3 cells, and the first line names 2"),
        ("query,response\na\n", "in.csv, row 1: a row has 1 cells, and the first line names 2"),
        ('query,response\n"a,A\nb,B\n', "in.csv, line 3: not CSV .*unexpected end of data.* stands in quotes"),
        ('query,response\n"a"x,A\n', "in.csv, line 2: not CSV"),
        ("query,query\na,A\n", "in.csv: the first line names 'query' twice"),
        (
            "a,A\nb,B\n",
            "in.csv, row 1: a row has the fields a 'b', A 'B'; known are .*; the first line of a table names its",
        ),
        ("a,a\nb,B\n", "in.csv: the first line names 'a' twice; .* or write a line of names, such as question,answer"),
        (b"query,response\n\xff,A\n", "in.csv: not UTF-8"),
        ("", "there is no row"),
    ],
)
def test_csv_that_cannot_be_read_is_told(preprocess, content, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        preprocess(content, name="in.csv")


def test_rows_of_other_cells_are_skipped_on_request(preprocess, capsys):
    assert asked(preprocess("query,response\na,A\nb\nc,C\n", "--skip_bad_rows", name="in.csv")) == ["a", "c"]
    assert "1 bad row left out" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """folder({name: text}) -> the path of a folder that holds these files."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / "rows" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "rows"

    return make


TWO = {"train-00000-of-00002.jsonl": lines("a", "b"), "train-00001-of-00002.jsonl": lines("c")}
HELD = {"validation.jsonl": lines("v"), "test.jsonl": lines("t")}


@pytest.mark.parametrize(
    "files, split, expected",
    [
        ({"x.jsonl": lines("a"), "y.jsonl": lines("b"), "README.md": "x", ".hidden.jsonl": "x"}, "", "ab"),
        ({"b.csv": "query,response\nb,B\n", "a.csv": "query,response\na,A\n", "info.json": "{}"}, "", "ab"),
        (TWO, "", "abc"),
        (TWO, "train[1:]", "bc"),
        (TWO | HELD, "", "abc"),
        (TWO | HELD, "test", "t"),
        (HELD | {"more.jsonl": lines("a")}, "train", "a"),
        ({f"data/{name}": text for name, text in (TWO | HELD).items()}, "validation", "v"),
        ({"test.jsonl": lines("t")}, "", "t"),
    ],
)
def test_folders_of_rows(folder, tmp_path, files, split, expected):
    command = [str(folder(files)), "--output", str(tmp_path / "data"), "--tokenizer", "bytes"]
    assert commands.main(["preprocess", *command, *(["--split", split] if split else [])]) == 0
    assert "".join(asked(BinidxDataset(tmp_path / "data"))) == expected


def test_a_folder_of_texts(folder):
    """A text is read only if the folder has no rows, and its name says nothing of a split."""
    files = {"b.txt": "B", "test a.txt": "A"}
    assert [item for _, item in read_rows(folder(files))] == ["B", "A"]
    assert len(list(read_rows(folder({"rows.jsonl": lines("a")})))) == 1


def test_a_folder_of_parquet(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = folder({"README.md": "x"})
    for split in ("train", "test"):
        parquet.write_table(pyarrow.table({"query": [split], "response": ["A"]}), path / f"{split}-0.parquet")
    assert [row["query"] for _, row in read_rows(path)] == ["train"]
    assert [row["query"] for _, row in read_rows(path, "test")] == ["test"]


@pytest.mark.parametrize(
    "files, split, message",
    [
        ({"a.jsonl": "x", "b.csv": "x"}, "", r"holds files of several kinds \(.csv, .jsonl\)"),
        ({"a.jsonl": "x", "a.jsonl.gz": "x"}, "", r"holds files of several kinds \(.jsonl, .jsonl.gz\)"),
        ({"main/a.jsonl": "x", "other/a.jsonl": "x"}, "", "several folders of rows; give one of .*main, .*other"),
        (TWO | HELD, "dev", "no split 'dev'; it has test, train, validation"),
        (HELD, "", "no split 'train'; it has test, validation"),
        (
            {"a.pdf": "x"},
            "",
            "not a folder that datasets.save_to_disk wrote, and no file in it can be read; name a file",
        ),
    ],
)
def test_folders_that_leave_a_choice_are_refused(folder, files, split, message):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=message):
        list(read_rows(folder(files), split))


OUT = "leads out of .*rows by a link, to .*; name that file itself, or put a copy in the link's place"


@pytest.mark.parametrize(
    "link, target",
    [
        ("env.txt", "/proc/self/environ"),
        ("a.jsonl", "../key"),
        ("data/train.jsonl", "../../key"),
        ("data", ".."),
        ("saved/data-00000-of-00001.arrow", "../../key"),
    ],
)
def test_a_link_out_of_a_folder_of_rows_is_refused(tmp_path, folder, link, target):
    (tmp_path / "key").write_text(lines("secret"))
    (tmp_path / "key.jsonl").write_text(lines("secret"))
    path = folder({"README.md": "x"})
    if link.startswith("saved"):
        path = save_folder(path / "saved", pytest.importorskip("pyarrow").table({"text": ["one"]})) / ".."
        (path / link).unlink()
    (path / link).parent.mkdir(exist_ok=True)
    (path / link).symlink_to(target)
    given = path / "saved" if link.startswith("saved") else path
    with pytest.raises(UserError, match=OUT.replace("rows", "saved") if link.startswith("saved") else OUT):
        main([str(given), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"])
    assert "leads out of" in preview({"path": str(given), "tokenizer": "bytes"})["error"]


def test_links_within_a_folder_and_to_it_are_followed(tmp_path, folder):
    path = folder({"all/a.jsonl": lines("a"), "all/key/b.jsonl": lines("b")})
    (path / "all" / "b.jsonl").symlink_to("key/b.jsonl")
    (tmp_path / "link").symlink_to(path / "all")
    (tmp_path / "one.jsonl").symlink_to(path / "all" / "a.jsonl")  # named itself
    asked_for = [
        [json.loads(item)["query"] for _, item in read_rows(place)]
        for place in (path / "all", tmp_path / "link", tmp_path / "one.jsonl")
    ]
    assert asked_for == [["a", "b"], ["a", "b"], ["a"]]


@pytest.fixture
def header(tmp_path, tiny_state, monkeypatch):
    """header(*flags) -> a run's header lines on its data, without training."""
    from rwkv_peft.training.flags.request import parse_run
    from rwkv_peft.training.inputs import find_samples

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_model(tmp_path / "base.pth", tiny_state(vocab_size=257))

    def run(*flags):
        fixed = ("--load_model", str(tmp_path / "base.pth"), "--tokenizer", "bytes", "--bone_r", "16")
        return "\n".join(find_samples(parse_run([*fixed, *map(str, flags)]).config)[0].notes)

    return run


@pytest.mark.parametrize("kind", ["files", "datasets"])
def test_a_folder_of_splits_validates_on_what_is_held_out(folder, header, kind):
    path = folder(TWO | HELD)
    if kind == "datasets":
        datasets = pytest.importorskip("datasets")
        splits = {"train": rows("a", "b", "c"), "test": rows("t"), "validation": rows("v", "w")}
        path = path / "saved"
        datasets.DatasetDict({name: datasets.Dataset.from_list(of) for name, of in splits.items()}).save_to_disk(path)
    said = header("--data_file", path, "--data_type", "sft", "--val_data", path)
    held = 1 if kind == "files" else 2
    assert f"validation on {held} samples of {path}, split validation: " in said and "is the training data" not in said
    assert "3 documents" in said
    said = header("--data_file", path, "--data_type", "sft", "--val_data", path, "--sft_split", "validation")
    assert f"note: --val_data {path}, split validation is the training data" in said


def test_to_validate_on_what_is_trained_on_is_told(folder, header):
    path = folder({"a.jsonl": lines("a", "b")})
    for given in (path, path / "a.jsonl"):
        said = header("--data_file", given, "--data_type", "sft", "--val_data", given, "--sft_split", "[:1]")
        assert f"note: --val_data {given} is the training data" in said
    said = header("--data_file", path, "--data_type", "sft", "--val_data", path / "a.jsonl")
    assert "is the training data" not in said and "2 of 2 held-out rows are training rows too" in said


def test_what_is_odd_about_rows_that_validate_is_told(folder, header):
    path = folder({"a.jsonl": lines("a", "b"), "b.jsonl": lines("a", "a") + "{}\n"})
    flags = ("--data_file", path / "a.jsonl", "--data_type", "sft", "--skip_bad_rows")
    said = header(*flags, "--val_data", path / "b.jsonl", "--retain_data", path / "b.jsonl")
    for flag in ("--val_data", "--retain_data"):
        assert f"{flag} {path / 'b.jsonl'}: note: 1 row the same as an earlier one" in said
        assert f"{flag} {path / 'b.jsonl'}: 1 bad row left out:\n" in said


@pytest.fixture
def unreadable():
    """unreadable(name) -> the path of a file that exists but may not be read, or is in a folder "shut" that may not be
    entered; root becomes another user for the test."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)

        def make(name):
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            (Path(folder) / name.split("/")[0]).chmod(0)
            if os.geteuid() == 0:
                os.seteuid(65534)
            return path

        yield make
        if os.getuid() == 0:
            os.seteuid(0)
        for path in Path(folder).iterdir():
            path.chmod(0o700)


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_a_folder_that_may_not_be_entered_is_one_message(unreadable, monkeypatch, capsys, ending):
    path = unreadable("shut/below/in" + ending)
    monkeypatch.setattr(sys, "argv", ["preprocess", str(path), "--output", str(path.parents[2] / "out")])
    with pytest.raises(SystemExit) as exit_info:
        exit_on_user_error(main)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and f"in{ending}" in error and "permission denied" in error


READERS = {name: lambda path: list(read_rows(path)) for name in ("in.jsonl", "in.txt", "in.parquet", "in.json")}
READERS |= {"a.pth": read_pth, "data.idx": BinidxDataset, "vocabulary.txt": load_tokenizer}
READERS |= {"metrics.jsonl": read_metrics, "template.txt": read_template}


@pytest.mark.parametrize("name", READERS)
def test_no_other_file_that_may_not_be_read_is_called_missing(unreadable, name):
    path = unreadable(name)
    with pytest.raises(UserError, match=f"{name} exists, but may not be read .permission denied"):
        READERS[name](str(path))


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows_of(path, split=""):
    return [row for _, row in read_rows(path, split)]


def written(kind, tmp_path, table):
    if kind == "folder":
        return save_folder(tmp_path / "rows", table)
    parquet.write_table(table, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_rows_are_what_was_written(tmp_path, kind):
    rows = [{"messages": CHAT * (number % 3 + 1), "n": number, "x": number / 2, "no": None} for number in range(2500)]
    path = written(kind, tmp_path, pyarrow.Table.from_pylist(rows))
    assert list(read_rows(path)) == [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_call_has_no_arguments_of_other_tools(tmp_path, kind):
    """Arrow gives all objects of a column the same fields, null where an object lacks them."""
    calls = [{"function": {"name": name, "arguments": given}} for name, given in (("f", {"a": 1}), ("g", {"b": "x"}))]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    assert rows_of(written(kind, tmp_path, pyarrow.Table.from_pylist(rows))) == rows


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_json_in_a_column_is_what_it_says(tmp_path, kind):
    """As datasets keeps values of mixed types: https://huggingface.co/docs/datasets has them as Json."""
    rows = [{"messages": CHAT, "tools": [{"name": "f", "parameters": None}]}, {"messages": None, "tools": []}]
    json_type = pyarrow.json_()
    texts, tool = pyarrow.array([json.dumps(CHAT), None]), pyarrow.array([json.dumps(rows[0]["tools"][0])])
    tools = pyarrow.ListArray.from_arrays([0, 1, 1], json_type.wrap_array(tool))
    table = pyarrow.table({"messages": json_type.wrap_array(texts), "tools": tools})
    assert rows_of(written(kind, tmp_path, table)) == rows


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("stamp", [("us", None, 1 << 62), ("ms", "No/Where", 5)])
def test_a_date_that_is_none_is_a_message(tmp_path, kind, stamp):
    unit, zone, value = stamp
    stamps = pyarrow.array([value], pyarrow.int64()).view(pyarrow.timestamp(unit, zone))
    with pytest.raises(UserError, match="or a damaged one: .*; copy it again"):
        rows_of(written(kind, tmp_path, pyarrow.table({"text": ["one"], "at": stamps})))


def test_the_columns_that_a_format_names_are_those_of_the_rows(tmp_path):
    table = pyarrow.table({"text": ["one"], "junk": [1]})
    assert rows_of(save_folder(tmp_path / "rows", table, _format_columns=["text"])) == [{"text": "one"}]


@pytest.mark.parametrize(
    "state, message",
    [
        ({"_data_files": [{"filename": "../outside.arrow"}]}, "outside.arrow is missing"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "/etc/passwd leads out of"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow is missing"),
        ({"_data_files": [3]}, "names no files of rows"),
        ({"_data_files": None}, "names no files of rows"),
        ({"_indices_data_files": [{"filename": "i.arrow"}]}, "keeps its rows in an order of its own"),
    ],
)
def test_a_folder_that_names_other_files_is_refused(tmp_path, state, message):
    with pytest.raises(UserError, match=message):
        rows_of(save_folder(tmp_path / "rows", pyarrow.table({"text": ["one"]}), **state))


@pytest.mark.parametrize("splits", [["../other"], ["/etc"], [".."], "train", None, [3]])
def test_a_folder_of_splits_names_its_own(tmp_path, splits):
    save_folder(tmp_path / "other", pyarrow.table({"text": ["one"]}))
    save_folder(tmp_path / "rows" / "train", pyarrow.table({"text": ["one"]}))
    (tmp_path / "rows" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError, match="no split 'train'; it has|leads out of|is missing"):
        rows_of(tmp_path / "rows")


def test_places_outside_of_a_file_are_not_looked_at(tmp_path):
    """An Arrow file whose texts would lie far behind its end."""
    folder = save_folder(tmp_path / "rows", pyarrow.table({"text": ["one", "two"]}))
    file = folder / "data-00000-of-00001.arrow"
    places = b"".join(number.to_bytes(4, "little") for number in (0, 3, 6))
    content = file.read_bytes()
    assert places in content
    file.write_bytes(content.replace(places, b"".join(n.to_bytes(4, "little") for n in (0, 1 << 30, 1 << 30))))
    with pytest.raises(UserError, match="not a file of Arrow, or a damaged one"):
        rows_of(folder)


PACKED_TEXT = gzip.compress(b"One.\n***\nTwo.\n", mtime=0)  # a time would be part of the test's name


@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("a.md", b"One.\n", True),
        ("a.txt.gz", PACKED_TEXT, True),
        ("big.txt", b"x" * (BYTES + 1), True),
        ("a.jsonl", b'{"text": "x"}', False),
    ],
)
def test_a_preview_takes_for_a_text_what_training_does(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    found = preview({"path": str(tmp_path / name), "tokenizer": "bytes"})
    assert found["texts"] == texts and sum(found["sizes"]) <= BYTES + 2
    assert any("first 4,194,304 bytes" in note for note in found["notes"]) == (name == "big.txt")
    assert found["offers"] == ([("document_end", "stars")] if "gz" in name else [])


@pytest.mark.parametrize(
    "name, content, due",
    [
        (
            "a.csv",
            "Prompt,response,n\nHi,Yes,1\n",
            {"fields": {"Prompt": "'Hi'", "response": "'Yes'", "n": "'1'"}, "offers": []},
        ),
        ("a.csv", "problem,solution,answer\nHi,Yes,1\n", {"offers": [["sft_field", "problem solution"]]}),
        ("a.jsonl", '{"prompt": "Hi", "chosen": "a", "rejected": "b"}', {"offers": [["data_type", "pairs"]]}),
        ("a.txt", "1.1.24, 8:00 - Ada: Hi\n1.1.24, 8:01 - Bo: Yes\n", {"names": {"Ada": 1, "Bo": 1}}),
        ("a.jsonl", '{"query": "Hi", "response": "Yes", "reasoning": "Hm hm."}', {"offers": [["sft_think", "on"]]}),
    ],
)
def test_a_preview_names_what_may_be_chosen_and_each_offer_works(tmp_path, name, content, due):
    (tmp_path / name).write_text(content)
    asked = {"path": str(tmp_path / name), "tokenizer": "bytes"}
    found = json.loads(json.dumps(preview(asked)))
    for key, value in due.items():
        assert (found[key][:1] if key == "offers" else found[key]) == value
    for flag, value in found["offers"]:
        again = preview(asked | {flag: value.split() if flag == "sft_field" else value})
        assert "error" not in again and again["sizes"]
    for person in found["names"]:
        assert preview(asked | {"sft_as": person})["sizes"]
    if "n" in found["fields"]:
        assert found["taken"] == {"Prompt": "question", "response": "answer"}
