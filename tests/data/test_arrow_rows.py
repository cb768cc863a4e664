"""Parquet files and folders of the datasets library: text is read unchanged, and nothing else is decoded."""

import contextlib
import json
import random
import socket

import pytest

from fuzz.foreign import save_folder
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.rows import read_rows

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

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


def test_a_picture_is_the_address_that_it_names_and_nobody_asks_for_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        picture = {"bytes": None, "path": f"http://127.0.0.1:{server.getsockname()[1]}/picture.png"}
        folder = save_folder(tmp_path / "rows", pyarrow.Table.from_pylist([{"text": "one", "image": picture}]))
        features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
        assert rows_of(folder) == [{"text": "one", "image": {"path": picture["path"]}}]
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


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


def test_whatever_is_wrong_with_a_folders_json_is_a_message(tmp_path):
    from fuzz.mutations import BYTES, JSON

    folder = save_folder(tmp_path / "rows" / "train", pyarrow.table({"messages": [CHAT]})).parent
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert rows_of(folder) == [{"messages": CHAT}]
    for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json"):
        content = (folder / name).read_bytes()
        for number in range(80):
            rng = random.Random(f"{name} {number}")
            (folder / name).write_bytes(rng.choice(JSON + BYTES[:4])(content, rng))
            with contextlib.suppress(UserError):
                rows_of(folder)
        (folder / name).write_bytes(content)
