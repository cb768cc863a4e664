"""A held file: it locks out every other process, by name, until its own process ends."""

import fcntl
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest

from rwkv_peft.checkpoints.lock import Busy, hold, holder

HOLD = "import sys; from pathlib import Path; from rwkv_peft.checkpoints.lock import hold\n"


def test_one_holds_it_and_is_named(tmp_path):
    words = f"process {os.getpid()} on {platform.node()}, since 20"
    with hold(tmp_path / "lock"), pytest.raises(Busy, match=words), hold(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_the_holder_keeps_nobody_from_it(tmp_path):
    with open(tmp_path / "lock", "w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        done = threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN))
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
    assert holder(tmp_path / "lock") is None and (tmp_path / "lock.json").exists()
    with hold(tmp_path / "lock"):
        assert holder(tmp_path / "lock")["process"] == os.getpid()


def test_two_never_hold_it_at_once(tmp_path):
    """Each removes the file as it lets go, while others open it."""
    code = HOLD + (
        "from rwkv_peft.checkpoints.lock import Busy; import os\n"
        "path, won = Path(sys.argv[1]), 0\n"
        "while won < 50:\n"
        "    try:\n"
        "        with hold(path / 'lock'):\n"
        "            os.mkdir(path / 'held'); os.rmdir(path / 'held'); won += 1\n"
        "    except Busy: pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]


def test_a_holder_without_a_description_is_one(tmp_path):
    with hold(tmp_path / "lock"):
        (tmp_path / "lock.json").write_text("[" * 100_000)
        assert holder(tmp_path / "lock") == {}
        with pytest.raises(Busy, match="another process"), hold(tmp_path / "lock"):
            pass


def test_the_error_of_its_holder_comes_through_where_the_folder_may_not_be_written_any_more(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(path)

    with monkeypatch.context() as patched, pytest.raises(KeyError), hold(tmp_path / "lock"):
        patched.setattr("pathlib.Path.unlink", refuse)
        raise KeyError
    with hold(tmp_path / "lock"):  # its file is still there, and free
        pass
