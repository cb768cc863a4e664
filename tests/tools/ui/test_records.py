"""Records of commands and runs, as the page reads them from a folder, which may be a stranger's."""

import json
import time

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.ui.files import lines_of
from rwkv_peft.tools.ui.jobs import Jobs, port_of


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


def test_lines_that_are_not_whole_are_read_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": NaN}\n{"st')
    found = lines_of(path)
    assert found == {"lines": [{"step": 0, "loss": None}], "next": 25, "again": False}
    path.write_bytes(b'{"step": 9}\n')
    assert lines_of(path, 25) == {"lines": [{"step": 9}], "next": 12, "again": True}
