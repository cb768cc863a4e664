"""Building DeepSpeed's Adam: a failure's reason is reported; the lock of a killed build is removed, and that of a
running build is not."""

import os
import signal
import time

import psutil
import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.training.optimizers.cpu_adam import cpu_adam, remove_stale_lock
from training.runs import start, wait_until


def test_a_lock_counts_while_a_process_has_it_open(tmp_path):
    lock = tmp_path / "lock"
    with open(lock, "x"):
        remove_stale_lock(lock)
        assert lock.exists()
    remove_stale_lock(lock)
    assert not lock.exists()


def test_no_lock_is_no_matter(tmp_path):
    remove_stale_lock(tmp_path / "lock")
    assert not list(tmp_path.iterdir())


WORDS = "an offload strategy needs DeepSpeed's Adam for the CPU, which cannot be built here: "


def test_offload_without_a_compiler_says_what_it_needs(train, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    monkeypatch.setenv("PATH", str(tmp_path))
    out, err = train("lacks", "--strategy", "deepspeed_stage_2_offload", code=2)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {WORDS}") and "apt install g++" in line and "Traceback" not in err
    assert "compiling DeepSpeed's Adam" in out


def test_a_folder_of_extensions_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=f"{WORDS}.*Not a directory.*TORCH_EXTENSIONS_DIR"):
        cpu_adam([])


def test_compilers_end_with_the_run_that_is_killed(command, tmp_path):
    """A compiler that never ends notes its process."""
    compiler, noted = tmp_path / "slow-c++", tmp_path / "pid"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *cpu_adam*) echo $$ > {noted}; exec sleep 3600;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    variables = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    run = start(command("killed", "--strategy", "deepspeed_stage_2_offload"), **variables)
    wait_until(lambda: noted.exists() and noted.read_text().strip(), run)
    building = psutil.Process(int(noted.read_text()))
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    while building.is_running() and building.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
