"""A run's progress line: the ETA leaves out the first step, in which kernels are loaded and compiled."""

import sys
from types import SimpleNamespace

import pytest

from rwkv_peft.ops.native.build import make_once
from rwkv_peft.training import progress
from rwkv_peft.training.progress import Progress, printing_compilations
from rwkv_peft.training.step.plan import Plan


@pytest.mark.parametrize("shell", [None, object()])
def test_a_notebook_gets_a_bar_and_a_process_that_has_only_imported_ipython_gets_lines(monkeypatch, capsys, shell):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    Progress(Plan(8, 1, 1, 0, 0)).update("loss 1", 1, 2.0, 80)
    assert ("1/1" in capsys.readouterr().out) and (Progress(Plan(8, 1, 1, 0, 0)).bar is None) == (shell is None)


class Clock:
    """A stand-in for the module time, whose clock shows `now`."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "time", Clock())
    monkeypatch.setattr(progress, "QUIET", 0)
    return progress.time


@pytest.mark.parametrize("first", [0, 50])
def test_the_eta_is_that_of_the_steps_after_the_first(clock, capsys, first):
    """In a new or resumed run the first step of the process takes 600 seconds, and each other one 2."""
    shown = Progress(Plan(8, 100, 100, first, 8 * first))
    for step, seconds in enumerate([600.0, 2.0, 2.0], start=first + 1):
        clock.now += seconds
        shown.update("loss 1", step, seconds, 80)
    assert capsys.readouterr().out.splitlines() == [
        f"step {first + 1}/100, loss 1, the first step took 600 s",
        f"step {first + 2}/100, loss 1, 40 tokens/s, ETA {'03:16' if not first else '01:36'}",
        f"step {first + 3}/100, loss 1, 40 tokens/s, ETA {'03:14' if not first else '01:34'}",
    ]


def test_what_is_compiled_is_told_once_and_by_one_rank(tmp_path, capsys):
    def make(work):
        (work / "made").write_bytes(b"kernel")
        return work / "made"

    with printing_compilations(False):
        make_once(tmp_path / "silent", "silent", make)
    with printing_compilations(True):
        for _ in range(2):
            make_once(tmp_path / "told", "told", make)
    make_once(tmp_path / "later", "later", make)
    assert capsys.readouterr().out == "compiling told, once for this machine\n"
