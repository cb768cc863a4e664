"""preprocess leaves a whole set of files, or none, for any end of it; and finds repeated rows wherever they are."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.preprocess import main


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


@pytest.fixture
def endless(tmp_path):
    """A running preprocess, in a session of its own, on rows that do not end."""
    rows, output = tmp_path / "in.jsonl", tmp_path / "data"
    os.mkfifo(rows)
    argv = [sys.executable, "-m", "rwkv_peft", "preprocess", rows, "--output", output, "--tokenizer", "bytes"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with open(rows, "wb") as file:
        done = threading.Event()

        def feed():
            with contextlib.suppress(BrokenPipeError):
                while not done.is_set():
                    file.write(b'{"text": "a row"}\n' * 1000)
            with contextlib.suppress(BrokenPipeError):
                file.close()

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        while not any(path.stat().st_size for path in tmp_path.glob(".data.bin.*.tmp/*.bin")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        yield process
        done.set()
        feeder.join(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_ctrl_c_on_a_terminal_is_one_word(endless, tmp_path):
    os.killpg(endless.pid, signal.SIGINT)
    said = endless.communicate(timeout=60)[1].splitlines()
    assert endless.returncode == 130 and said[-1] == "interrupted"
    assert [line for line in said[:-1] if line and "tokenizing" not in line] == []
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert left == ["in.jsonl"]


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
