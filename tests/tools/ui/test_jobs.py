"""The commands that the page starts, as its server sees them."""

import os
import time

import pytest

from rwkv_peft.tools.ui.jobs import Jobs, close_chats


def test_a_command_that_begins_slowly_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("rwkv_peft.tools.ui.jobs.STARTING", 0.0)
    monkeypatch.setattr("rwkv_peft.tools.ui.jobs.python_command", lambda *_: ["sleep", "600"])
    jobs = Jobs(tmp_path)
    name = jobs.start(["doctor"])
    assert jobs.job(name)["state"] == "running"
    jobs.own[name].kill()
    jobs.own[name].wait()
    assert jobs.job(name)["state"] == "lost"


def test_no_command_that_has_ended_is_left_as_a_zombie(monkeypatch, tmp_path):
    monkeypatch.setattr("rwkv_peft.tools.ui.jobs.python_command", lambda *_: ["true"])
    jobs = Jobs(tmp_path)
    for _ in range(5):
        jobs.start(["doctor"])
    end = time.monotonic() + 300
    for process in jobs.own.values():
        with pytest.raises(ChildProcessError):
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) or time.monotonic() < end:
                time.sleep(0.01)


def test_a_page_that_ends_closes_its_models_and_leaves_runs(monkeypatch, tmp_path):
    jobs, stopped = Jobs(tmp_path), []
    jobs.own = {"1": None, "2": None}
    monkeypatch.setattr(jobs, "job", lambda name: {"words": ["serve" if name == "1" else "train"]})
    monkeypatch.setattr(jobs, "stop", stopped.append)
    close_chats(jobs)
    assert stopped == ["1"]
