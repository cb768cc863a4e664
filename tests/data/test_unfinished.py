"""A preprocess that was cut off goes on to the same files, and finds repeated rows wherever they are."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data import preprocess, rows, shard_writer
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.preprocess import DIGEST, Seen, main


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Rows in many chunks, each of which is noted, of which some are repeated and a text goes on over chunks."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 200)
    monkeypatch.setattr(shard_writer, "SECONDS", 0)
    content = [{"query": str(n % 13), "response": "r" * (n % 13), "weight": 1 + n % 2} for n in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "text.txt").write_text("".join(f"line {n}\n" for n in range(600)))
    return tmp_path


def command(folder, name, *flags):
    inputs = [str(folder / file) for file in ("in.jsonl", "text.txt")]
    return main([*inputs, "--output", str(folder / name), *flags])


def made(folder, name):
    return {path.name.removeprefix(name): path.read_bytes() for path in folder.glob(f"{name}[.-]*")}


def cut_off(monkeypatch, folder, name, chunks, *flags):
    """Run a command that is killed after so many chunks."""
    encode = preprocess.encode_all

    def some(*arguments):
        for number, part in enumerate(encode(*arguments)):
            if number == chunks:
                raise KeyboardInterrupt
            yield part

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(preprocess, "encode_all", some)
        command(folder, name, *flags)


@pytest.mark.parametrize("flags", [(), ("--shard_tokens", "60"), ("--drop_duplicates", "--shard_tokens", "100")])
def test_a_command_goes_on_to_the_same_files(small, monkeypatch, capfd, flags):
    command(small, "whole", *flags)
    report = capfd.readouterr().out
    for chunks in (5, 4, 4, 5):
        cut_off(monkeypatch, small, "parts", chunks, *flags)
        with open(max((small / ".parts.unfinished").glob("*.bin")), "ab") as file:
            file.write(b"what was not noted any more")
    assert not list(small.glob("parts*"))
    capfd.readouterr()
    command(small, "parts", *flags)
    out, err = capfd.readouterr()
    assert "going on behind" in err and out == report.replace("whole", "parts")
    whole, parts = (
        {end: text.replace(name.encode(), b"") for end, text in made(small, name).items()}
        for name in ("whole", "parts")
    )
    assert whole == parts and not list(small.glob(".*"))


@pytest.mark.parametrize("change", ["input", "flags", "damage", "journal", "link"])
def test_a_command_of_other_inputs_or_damaged_files_begins_anew(small, monkeypatch, capfd, change):
    cut_off(monkeypatch, small, "data", 9)
    unfinished = small / ".data.unfinished"
    flags = ("--no-append_eod",) if change == "flags" else ()
    if change == "input":
        (small / "in.jsonl").write_text('{"text": "another"}\n')
    elif change == "damage":
        path = unfinished / "00001.bin"
        path.write_bytes(b"x" + path.read_bytes()[1:])
    elif change == "journal":
        (unfinished / "journal.json").write_text("{")
    elif change == "link":
        (small / "mine").write_bytes((unfinished / "00001.bin").read_bytes())
        (unfinished / "00001.bin").unlink()
        (unfinished / "00001.bin").symlink_to(small / "mine")
    before = [*map(Path.read_bytes, small.glob("mine"))]
    command(small, "data", *flags)
    assert before == [*map(Path.read_bytes, small.glob("mine"))]
    assert "going on" not in capfd.readouterr().err and not unfinished.exists()
    command(small, "whole", *flags)
    assert made(small, "data") == made(small, "whole")


def test_a_refusal_leaves_nothing(small):
    (small / "in.jsonl").write_text((small / "in.jsonl").read_text() + "no JSON\n")
    with pytest.raises(UserError, match="line 61: not JSON"):
        command(small, "data")
    assert {path.name for path in small.iterdir()} == {"in.jsonl", "text.txt"}


def test_repeated_rows_are_counted_or_dropped(small, capfd):
    command(small, "all")
    assert "note: 47 rows the same as an earlier one" in capfd.readouterr().out
    command(small, "first", "--drop_duplicates")
    out = capfd.readouterr().out
    assert "47 rows the same as an earlier one, dropped" in out and "note: 47" not in out
    kept, everything = BinidxDataset(small / "first"), BinidxDataset(small / "all")
    assert len(everything) == 61 and len(kept) == 14  # weights apart, 13 rows and the text
    due = [*range(13), 60]
    assert [document.tobytes() for document in kept] == [everything[number].tobytes() for number in due]
    for number, place in enumerate(due):
        assert kept.weights[number] == everything.weights[place]


def test_digests_are_found_again_in_any_order():
    draw = random.Random(0)
    seen, known, counts = Seen(), set(), Counter()
    for _ in range(60):
        digests = [
            bytes([0] * draw.choice((0, 12))).ljust(DIGEST, bytes([draw.randrange(200)]))
            for _ in range(draw.randrange(9))
        ]
        due = []
        for digest in digests:
            due.append(digest in known)
            known.add(digest)
        assert seen.add(b"".join(digests)).tolist() == due
        counts.update(due)
        assert len(seen) == len(known) and sum(run.nbytes for run in seen.runs) == DIGEST * len(known)
        assert all(len(left) >= 2 * len(right) for left, right in zip(seen.runs, seen.runs[1:]))
    assert min(counts.values()) > 50
    few = Seen(3)
    few.add(b"".join(bytes([n]) * DIGEST for n in range(1, 5)))
    assert few.add(bytes([9]) * DIGEST * 2).tolist() == [False, True] and len(few) == 4
