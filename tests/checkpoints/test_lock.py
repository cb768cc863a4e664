"""A held file: it locks out every other process, by name, until its own process ends."""

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest

from rwkv_peft.checkpoints.lock import LEFT, Busy, hold, holder

HOLD = "import sys; from pathlib import Path; from rwkv_peft.checkpoints.lock import hold\n"


def test_one_holds_it_and_is_named(tmp_path):
    words = f"process {os.getpid()} on {platform.node()}, since 20"
    with hold(tmp_path / "lock"), pytest.raises(Busy, match=words), hold(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_asks_for_the_holder_keeps_nobody_from_it(tmp_path):
    with open(tmp_path / "lock", "w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        done = threading.Timer(2 * LEFT, fcntl.flock, (asking, fcntl.LOCK_UN))
        done.start()
        with hold(tmp_path / "lock"):
            done.join()
            assert holder(tmp_path / "lock")["process"] == os.getpid()
    assert holder(tmp_path / "lock") is None


def test_a_killed_process_holds_nothing(tmp_path):
    code = HOLD + "with hold(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with pytest.raises(Busy, match=f"process {process.pid} on"), hold(tmp_path / "lock"):
            pass
        process.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / "lock").read_text())["process"] == process.pid
    with hold(tmp_path / "lock"):
        pass


def test_two_never_hold_it_at_once(tmp_path):
    """Each removes the file as it lets go, while others open it."""
    code = HOLD + (
        "from rwkv_peft.checkpoints.lock import Busy; import os\n"
        "path, won = Path(sys.argv[1]), 0\n"
        "while won < 300:\n"
        "    try:\n"
        "        with hold(path / 'lock'):\n"
        "            os.mkdir(path / 'held'); os.rmdir(path / 'held'); won += 1\n"
        "    except Busy: pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]


def test_a_holder_that_says_nonsense_about_itself_is_one(tmp_path):
    with hold(tmp_path / "lock"):
        (tmp_path / "lock").write_text("[" * 100_000)
        with pytest.raises(Busy, match="another process, which does not say who it is"), hold(tmp_path / "lock"):
            pass


def test_another_users_file_locks_out_as_well(tmp_path, monkeypatch):
    """Whose rights allow to read it, and then nothing."""
    own, refused = os.open, os.O_RDWR

    def open_as_other(path, flags, *mode):
        if flags & refused == refused:
            raise PermissionError(path)
        return own(path, flags, *mode)

    with hold(tmp_path / "lock"):
        monkeypatch.setattr(os, "open", open_as_other)
        with pytest.raises(Busy, match=f"process {os.getpid()} on"), hold(tmp_path / "lock"):
            pass
    (tmp_path / "lock").write_text("of a process that was killed")
    with hold(tmp_path / "lock"), pytest.raises(Busy, match="does not say"), hold(tmp_path / "lock"):
        pass
    (tmp_path / "lock").touch()
    refused = 0
    with pytest.raises(Busy, match="by another user, it seems; if not, remove "), hold(tmp_path / "lock"):
        pass


def test_a_link_at_its_place_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    (tmp_path / "other").write_text("kept")
    with pytest.raises(OSError), hold(tmp_path / "lock"):
        pass
    assert (tmp_path / "other").read_text() == "kept"


def test_what_ended_its_holder_is_told_where_the_folder_may_not_be_written_any_more(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(path)

    with pytest.raises(KeyError), hold(tmp_path / "lock"):
        monkeypatch.setattr("pathlib.Path.unlink", refuse)
        raise KeyError
    with hold(tmp_path / "lock"):  # which is free, be it that its file is there
        pass
