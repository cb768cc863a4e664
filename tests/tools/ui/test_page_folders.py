"""Files of a folder as the page's server reads and writes them: files taken in, records of commands and runs, which may
have come from a stranger, the time of a run, and the processes of commands."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rwkv_peft.checkpoints.lock import hold
from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.ui.files import LONGEST, MOST, TAIL, Places, Uploads, cleaned, last_of, lines_of
from rwkv_peft.tools.ui.jobs import Jobs, close_chats, port_of
from rwkv_peft.tools.ui.proposals import proposals
from rwkv_peft.tools.ui.runs import LEAST, find_runs, folders, measured
from tools.ui.pages import ROOT


@pytest.mark.parametrize(
    "name, kept",
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\表 格 (2).csv", "表 格 (2).csv"),
        (".bashrc", "bashrc"),
        ("-rf $(x)`y`\n\x1b\u202e.txt", "rf _(x)_y____.txt"),
        ("a" * 300 + ".parquet", "a" * (LONGEST - len("parquet")) + ".parquet"),
        ("文" * 300, "文" * LONGEST),
    ],
)
def test_names_of_files_that_are_taken_are_cleaned(name, kept):
    assert cleaned(name) == kept and len(os.fsencode(f"{kept}-99.part")) <= 255


def test_parts_become_a_file_that_replaces_none(tmp_path):
    uploads = Uploads(tmp_path)
    (tmp_path / "rows.jsonl").write_text("mine")
    (tmp_path / "rows-2.jsonl").symlink_to(tmp_path / "elsewhere")
    assert uploads.take("rows.jsonl", 0, 9, b"dropped") == ""  # an upload that ended on the way
    for begin, name in ((0, ""), (3, ""), (6, "rows-3.jsonl")):
        assert uploads.take("rows.jsonl", begin, 9, b"abc") == name
    assert (tmp_path / "rows-3.jsonl").read_bytes() == b"abcabcabc" and (tmp_path / "rows.jsonl").read_text() == "mine"
    assert uploads.take("empty", 0, 0, b"") == "empty" and uploads.take("empty", 0, 0, b"") == "empty-2"
    assert not (tmp_path / "elsewhere").exists() and not list(uploads.folder.iterdir())
    with ThreadPoolExecutor(20) as threads:  # of one name, at once
        names = list(threads.map(lambda number: uploads.take("many", 0, 9999, bytes([number]) * 9999), range(20)))
    assert {(tmp_path / name).read_bytes()[0] for name in names} == {*range(20)} == {*range(len({*names}))}


def test_parts_that_do_not_follow_and_files_that_cannot_be_kept_are_refused(tmp_path, monkeypatch):
    uploads = Uploads(tmp_path)
    uploads.take("b", 0, 3, b"a")
    for name, begin, size, part, message in (
        *((name, 0, 1, b"a", "rename it") for name in ("", "..", "a/", ".-_ ")),
        ("a", 0, MOST + 1, b"a", f"at most {MOST >> 30} GiB"),
        ("a", 0, 2, b"abc", "at most"),
        ("a", 0, 3, b"", "at most"),
        ("a", -1, 3, b"abc", "at most"),
        ("a", 1, 3, b"ab", "another tab"),
        ("b", 2, 3, b"c", "another tab"),
    ):
        with pytest.raises(UserError, match=message):
            uploads.take(name, begin, size, part)
    monkeypatch.setattr("rwkv_peft.checkpoints.atomic.room_at", lambda path: 2)
    with pytest.raises(UserError, match="free some space"):
        uploads.take("a", 0, 3, b"a")
    assert not (tmp_path / "a").exists()


def test_no_link_or_pipe_that_came_with_a_folder_is_followed(tmp_path):
    outside, uploads = tmp_path / "outside", Uploads(tmp_path / "files")
    outside.write_text("mine")
    uploads.folder.mkdir(parents=True)
    (uploads.folder / "a.part").symlink_to(outside)
    os.mkfifo(uploads.folder / "b.part")
    for name in "ab":
        with pytest.raises(OSError):  # and the pipe is not waited for
            uploads.take(name, 4, 5, b"x")
    assert uploads.take("a", 0, 1, b"x") == "a" and outside.read_text() == "mine"
    uploads.folder.rename(tmp_path / "moved")
    uploads.folder.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="by a link"):
        uploads.take("b", 0, 1, b"x")


def test_records_of_commands_that_came_with_a_folder_are_data(tmp_path):
    jobs = Jobs(tmp_path)
    records = [
        "{}",
        "[1]",
        "[" * 300,
        '{"words": ["serve", "--port", "9"], "began": 1e18}',
        '{"words": [], "began": 1}',
        f'{{"words": ["serve", "--port", "9"], "began": {10**400}}}',
        json.dumps({"words": ["serve", "--port", "9"], "began": time.time()}),
    ]
    for number, record in enumerate(records):
        (jobs.folder / str(number)).mkdir(parents=True)
        (jobs.folder / str(number) / "command.json").write_text(record)
    (jobs.folder / ("9" * 255)).mkdir()
    (jobs.folder / "7").symlink_to(jobs.folder / "6")
    assert [(job["id"], job["state"]) for job in jobs.all()] == [("6", "running"), ("3", "lost")]
    with pytest.raises(UserError, match="serves no model now"):
        port_of(jobs, "6")  # which would get the key of the page's own models
    (jobs.folder / "6" / "output.txt").symlink_to("/etc/passwd")
    assert "output" not in jobs.read("6") and jobs.new_folder().name == "8"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".rwkv-peft").symlink_to(jobs.folder.parent)
    with pytest.raises(UserError, match="by a link"):
        Jobs(tmp_path / "other").start(["doctor"])


def test_lines_that_are_not_whole_are_read_later_and_the_last_ones_alone_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_of(path) == []
    path.write_bytes(b'{"step": 0, "loss": NaN}\n{"st')
    assert lines_of(path) == {"lines": [{"step": 0, "loss": None}], "next": 25, "again": False}
    path.write_bytes(b'{"step": 9}\n')
    assert lines_of(path, 25) == {"lines": [{"step": 9}], "next": 12, "again": True}
    lines = [{"step": step, "completion": "x" * 1000} for step in range(400)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 400')
    found = last_of(path)
    assert found == lines[-len(found) :] and len(found) == TAIL // len(json.dumps(lines[-1]) + "\n")


def test_near_runs_are_found_with_their_steps_and_links_and_hidden_folders_passed_over(tmp_path, monkeypatch):
    for name in ("a", "a/b/c/d/e", "a/b/c/d/e/f", ".hidden", "checkpoints"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"steps": 50000}')
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(50_000)))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = {run["folder"]: (run["done"], run["steps"]) for run in find_runs(Places(tmp_path))}
    assert found == {"a": (50_000, 50_000), "a/b/c/d/e": (2, 50_000)}
    monkeypatch.setattr("rwkv_peft.tools.ui.files.LOOKED", 2)
    assert list(folders(tmp_path)) == [tmp_path / "a"]


def touch(path, at, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    os.utime(path, (at, at))


def test_a_run_and_its_command_have_one_state_and_say_what_they_do_now(tmp_path):
    """By the files in their order: the lock's description, config.json, rows.jsonl, metrics.jsonl, the exit code."""
    now, jobs, run = time.time(), Jobs(tmp_path), tmp_path / "out/a"
    (jobs.folder / "1").mkdir(parents=True)
    words = ["train", "--proj_dir", "./out/a"]
    (jobs.folder / "1/command.json").write_text(json.dumps({"words": words, "began": now}))

    def seen():
        (found,) = find_runs(Places(tmp_path), jobs.all())
        assert found["folder"] == "out/a" and found["job"] == "1"
        return found["state"], found["now"] and tuple(found["now"].values())

    assert seen() == ("begins", ("reads", 0, 0))  # the folder is not made yet
    with hold(jobs.folder / "1/.lock"):
        touch(run / "config.json", now - 99, {"steps": 4})  # of a run that was killed here
        touch(run / "metrics.jsonl", now - 99, {"step": 2})
        with hold(run / ".run.lock"):
            touch(run / ".run.lock.json", now + 5)
            assert seen() == ("running", ("reads", 0, 0))
            touch(run / "config.json", now + 6, {"steps": 4})
            assert seen() == ("running", ("measures", 0, 0))
            rows = [{"before": {"text": "a"}}, {"before": None}]
            touch(run / "rows.jsonl", now + 7, *rows)
            assert seen() == ("running", ("before", 1, 2))
            touch(run / "metrics.jsonl", now + 8, {"step": 0})
            assert seen() == ("running", ("steps", 1, 4))
            touch(run / "metrics.jsonl", now + 8, {"step": 3})
            touch(run / "rows.jsonl", now + 9, rows[0] | {"after": {"text": "b"}}, rows[1])
            assert seen() == ("running", ("after", 1, 2))
        assert seen() == ("done", None)  # while the command ends
    for code, done, state in (("1", 2, "failed"), ("130", 2, "stopped"), ("0", 2, "done"), ("130", 3, "done")):
        touch(run / "metrics.jsonl", now + 8, {"step": done})
        (jobs.folder / "1/exit").write_text(code)
        os.utime(jobs.folder / "1/exit", (now + 20, now + 20))
        assert seen() == (state, None)
    touch(run / "metrics.jsonl", now + 99, {"step": 1})  # by a terminal, since
    (found,) = find_runs(Places(tmp_path), jobs.all())
    assert (found["state"], found["job"]) == ("stopped", None)


def test_models_and_rows_are_proposed_and_other_files_are_not(tmp_path):
    base = (ROOT / "demo/rwkv7-demo.pth").read_bytes()
    run = {"config.json": b"{}", "metrics.jsonl": b"", "rows.jsonl": b"", "merged.pth": base}
    files = {
        **{f"out/a/{name}": content for name, content in run.items()},
        **{
            "base.pth": base,
            "state.pth": base[:1000],
            ".hidden.jsonl": b"",
            "rows.csv": b"a,b",
            "deep/rows.jsonl": b"{}",
        },
        **{"list.json": b"\n[{}]", "settings.json": b"{}", "notes.md": b"", "checkpoints/c.jsonl": b""},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.jsonl").symlink_to("/etc/passwd")
    found = proposals(Places(tmp_path))
    assert sorted(one["name"] for one in found["rows"] if one["sound"]) == ["deep/rows.jsonl", "list.json"]
    assert [one["name"] for one in found["rows"] if not one["sound"]] == ["rows.csv"]  # which holds no row
    facts = {"generation": "RWKV-7", "layers": 3, "channels": 128, "parameters": 786_304, "tokenizer": "bytes"}
    assert found["bases"] == [{"name": name, "bytes": len(base)} | facts for name in ("base.pth", "out/a/merged.pth")]


FLAGS = {"load_model": "base.pth", "data_file": ["rows.jsonl"], "micro_bsz": "8"}


@pytest.fixture
def ask(tmp_path):
    """ask(flags, words, seconds): the time of `words`, after a run with `flags` and steps of so many seconds."""
    for name in ("base.pth", "rows.jsonl"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9, 1e9))
    (tmp_path / "out").mkdir()

    def asked(flags, words, seconds=(9.0, *[2.0] * 9), **settings):
        told = {"steps": 10, "train": {"epoch_count": 2}, "flags": FLAGS | flags} | settings
        (tmp_path / "out" / "config.json").write_text(json.dumps(told))
        lines = [{"step": step, "tokens": 100, "tokens_per_s": 100 / one} for step, one in enumerate(seconds)]
        (tmp_path / "out" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        given = "--load_model base.pth --data_file rows.jsonl --micro_bsz 8"
        return measured(Places(tmp_path), f"{given} {words}".split())

    return asked


@pytest.mark.parametrize(
    "flags, words, steps",
    [
        ({}, "", 10),
        ({"lr_init": "1", "proj_dir": "a"}, "--lr_init 2 --proj_dir b --merge_on_save", 10),
        ({"epoch_count": "2"}, "--epoch_count 6", 30),
        ({}, "--epoch_count 6", 30),
        ({"epoch_count": "2"}, "", 0),  # how many epochs are chosen is not known
        ({}, "--ctx_len 99", 0),
        ({"bone_r": "8"}, "", 0),
    ],
)
def test_the_time_of_a_run_is_that_of_the_same_steps_of_an_earlier_one(ask, flags, words, steps):
    found = ask(flags, words)
    assert found == (steps and {"seconds": pytest.approx(9 + 2 * (steps - 1)), "steps": steps, "run": "out"} or None)


def test_no_time_is_told_after_too_few_steps_or_of_other_files(ask, tmp_path):
    assert ask({}, "", [1.0] * (LEAST - 1)) is None and ask({}, "", [1.0] * LEAST)
    assert ask({}, "", steps="x") is None and ask({}, "--epoch_count 3", train=[]) is None
    for name in ("base.pth", "rows.jsonl"):
        os.utime(tmp_path / name, (4e9, 4e9))
        assert ask({}, "") is None
        os.utime(tmp_path / name, (1e9, 1e9))


def test_a_command_that_begins_slowly_runs_and_none_is_left_as_a_zombie(monkeypatch, tmp_path):
    monkeypatch.setattr("rwkv_peft.tools.ui.jobs.STARTING", 0.0)
    monkeypatch.setattr("rwkv_peft.tools.ui.jobs.python_command", lambda *_: ["sleep", "600"])
    jobs = Jobs(tmp_path)
    name = jobs.start(["doctor"])
    assert jobs.job(name)["state"] == "running"
    jobs.own[name].kill()
    end = time.monotonic() + 300
    with pytest.raises(ChildProcessError):
        while os.waitid(os.P_PID, jobs.own[name].pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) or time.monotonic() < end:
            time.sleep(0.01)
    jobs.own[name].wait()
    assert jobs.job(name)["state"] == "lost"


def test_a_page_that_ends_closes_its_models_and_leaves_runs(monkeypatch, tmp_path):
    jobs, stopped = Jobs(tmp_path), []
    jobs.own = {"1": None, "2": None}
    monkeypatch.setattr(jobs, "job", lambda name: {"words": ["serve" if name == "1" else "train"]})
    monkeypatch.setattr(jobs, "stop", stopped.append)
    close_chats(jobs)
    assert stopped == ["1"]
