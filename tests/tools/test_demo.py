"""The demo's files: a command writes them, keeps others, and names the run that learns from them."""

import json
import shlex

from rwkv_peft.cli.commands import main
from rwkv_peft.tools import demo
from rwkv_peft.training.flags.request import check_flags


def test_the_demo_is_written_once_and_names_a_run_that_begins(tmp_path, capsys, monkeypatch):
    for _ in range(2):
        assert main(["demo", str(tmp_path / "new")]) == 0
    *names, command = capsys.readouterr().out.splitlines()[-3:]
    base, rows = (tmp_path / "new" / name for name in (demo.BASE, demo.ROWS))
    assert names == [str(base), str(rows)] and base.read_bytes() == (demo.SOURCE / demo.BASE).read_bytes()
    chats = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    assert len(chats) == demo.CHATS and {turn["role"] for turns in chats for turn in turns} == {"user", "assistant"}
    check_flags(shlex.split(command)[2:])
    rows.write_text("mine")
    main(["demo", str(tmp_path / "new")])
    assert rows.read_text() == "mine"
