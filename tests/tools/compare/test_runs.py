"""The processes of a comparison's runs: what ends them, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rwkv_peft.checkpoints.lock import alone_in
from rwkv_peft.children import python_command
from rwkv_peft.cli.errors import UserError, ending_in_order, hangup_signals
from rwkv_peft.tools.compare import runs
from rwkv_peft.tools.compare.command import main
from rwkv_peft.tools.compare.flags import parse_flags
from rwkv_peft.tools.compare.plan import Cell, Size
from rwkv_peft.tools.compare.runs import Process, finish, run_cells, start
from rwkv_peft.training.saving.checkpoints import DIVERGED, find_checkpoint
from tools.compare.lines import OWN, TRAIN

pytestmark = pytest.mark.usefixtures("there")


def sleeping(comparison, cell, size, folder):
    folder.mkdir(parents=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    return Process(cell, folder, time.monotonic(), child)


class Clock:
    """A clock that goes on only while somebody waits."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def begun(monkeypatch):
    """The runs that began; each only sleeps."""
    found = []

    def begin(*arguments):
        found.append(sleeping(*arguments))
        return found[-1]

    monkeypatch.setattr(runs, "start", begin)
    return found


def test_the_budget_ends_what_runs_and_starts_nothing_more(tmp_path, monkeypatch, begun):
    comparison = parse_flags(["--output", str(tmp_path), *OWN, "--", *TRAIN])
    monkeypatch.setattr(runs, "time", Clock())
    cells, sizes = [Cell("bone", -6, 7), Cell("bone", -5, 7)], {"bone": None}
    assert not run_cells(comparison, cells, sizes, 2.0, lambda *rest: None)
    assert [process.child.returncode for process in begun] == [-15]
    assert not run_cells(comparison, cells[1:], sizes, 1.0, lambda *rest: None)
    assert len(begun) == 1


@pytest.mark.parametrize(
    "code, log, diverged",
    [
        (0, "finished", False),
        (1, f"error: the loss became nan at step 3; {DIVERGED}. No checkpoint had been saved yet", True),
        (1, "error: rank 1 was ended by SIGKILL; no checkpoint had been saved yet; …", None),
        (1, "Traceback …", None),
        (2, "", None),
    ],
)
def test_a_run_that_diverged_is_a_result_and_one_that_failed_is_not(tmp_path, code, log, diverged):
    (tmp_path / "log.txt").write_text(log + "\n\n")
    process = Process(Cell("bone", -6, 7), tmp_path, 0.0, None, code, 500.0)
    if diverged is None:
        with pytest.raises(UserError, match=f"bone, rate 0.001, seed 7 ended with exit code {code}: {log[:9]}"):
            finish(process)
        assert not (tmp_path / "result.json").exists()
        return
    finish(process)
    assert json.loads((tmp_path / "result.json").read_text())["diverged"] is diverged


def test_a_comparison_that_is_killed_leaves_no_run_behind(files, warm_python):
    folder = files / "killed"
    run = folder / "runs" / Cell("bone", -6, 7).folder
    metrics = run / "metrics.jsonl"  # empty until a step is done, from which on SIGTERM asks for a save
    words = ["--methods", "bone", "--rank", "8", "--seeds", "7", "--steps", "100000", "--output", folder]
    comparison = subprocess.Popen(python_command("rwkv_peft", "compare", *words, "--rates", "1e-3", "--", *TRAIN))
    try:
        wait_until(lambda: metrics.exists() and metrics.read_text() or comparison.poll() is not None)
    finally:
        comparison.kill()
        comparison.wait()
    wait_until(lambda: not trains(run))
    assert find_checkpoint(run), (run / "log.txt").read_text()  # with which the same command goes on


def trains(run):
    try:
        with alone_in(run):
            return False
    except UserError:
        return True


def wait_until(true, seconds=300):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not hangup_signals(), reason="is to ignore it, as under nohup")
def test_a_terminal_that_goes_away_stops_its_runs(tmp_path, monkeypatch, begun):
    clock = Clock()
    monkeypatch.setattr(runs, "time", clock)
    monkeypatch.setattr(clock, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGHUP))
    with ending_in_order():
        code = main(["--output", str(tmp_path / "hung-up"), *OWN, "--rates", "1e-3", "--", *TRAIN])
    assert code == 128 + signal.SIGHUP
    assert {process.child.returncode for process in begun} == {-15}


def test_a_run_that_left_no_checkpoint_begins_anew(tmp_path, monkeypatch):
    comparison = parse_flags(["--output", str(tmp_path), *OWN, "--", *TRAIN])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    with alone_in(tmp_path / "run"), pytest.raises(UserError, match="a run is training there"):
        start(comparison, Cell("bone", -6, 7), Size(8, 0, 100), tmp_path / "run")
    argvs = []
    monkeypatch.setattr(runs.subprocess, "Popen", lambda argv, **rest: argvs.append(argv))
    size = Size(8, 0, 100)
    start(comparison, Cell("bone", -6, 7), size, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and "--resume" not in argvs[0]
    monkeypatch.setattr(runs, "find_checkpoint", lambda folder: folder)
    start(comparison, Cell("bone", -6, 7), size, tmp_path / "run")
    assert argvs[-1][-2:] == [
        "--resume",
        "auto",
    ]  # of a run that has done its steps too, whose picture the disk refused
