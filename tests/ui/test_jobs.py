"""The commands that the page starts, as its server sees them."""

import pytest

from rwkv_peft.errors import UserError
from rwkv_peft.ui.chat import close_chats
from rwkv_peft.ui.jobs import Jobs


def test_a_command_that_begins_slowly_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("rwkv_peft.ui.jobs.STARTING", 0.0)
    monkeypatch.setattr("rwkv_peft.ui.jobs.python_command", lambda *_: ["sleep", "600"])
    jobs = Jobs(tmp_path)
    name = jobs.start(["doctor"])
    assert jobs.job(name)["state"] == "running"
    jobs.own[name].kill()
    jobs.own[name].wait()
    assert jobs.job(name)["state"] == "lost"


def test_a_page_that_ends_closes_its_models_and_leaves_runs(monkeypatch, tmp_path):
    jobs, stopped = Jobs(tmp_path), []
    jobs.own = {"1": None, "2": None}
    monkeypatch.setattr(jobs, "job", lambda name: {"words": ["serve" if name == "1" else "train"]})
    monkeypatch.setattr(jobs, "stop", stopped.append)
    close_chats(jobs)
    assert stopped == ["1"]


def test_records_of_commands_that_came_with_a_folder_are_data(tmp_path):
    jobs = Jobs(tmp_path)
    records = [
        "{}",
        "[1]",
        "[" * 300,
        '{"words": ["serve", "--port", "9"], "began": 1e18}',
        '{"words": [], "began": 1}',
    ]
    for number, record in enumerate(records):
        (jobs.folder / str(number)).mkdir(parents=True)
        (jobs.folder / str(number) / "command.json").write_text(record)
    assert [(job["id"], job["state"]) for job in jobs.all()] == [("3", "lost")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".rwkv-peft").symlink_to(jobs.folder.parent)
    with pytest.raises(UserError, match="by a link"):
        Jobs(tmp_path / "other").start(["doctor"])
