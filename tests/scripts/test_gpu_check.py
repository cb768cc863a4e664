"""scripts/gpu_check.sh on a machine whose Python and sanitizer are fakes: what it runs, and what it says of it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
-) echo "some card"; exit "$NO_GPU" ;;
*"$FAILING"*) exit 1 ;;
esac
"""


@pytest.fixture
def gpu_check(tmp_path):
    """gpu_check(no_gpu, failing) -> the finished process, and the calls of python and the sanitizer, a line each."""
    repo, calls = tmp_path / "repo", tmp_path / "calls"
    repo.mkdir()
    shutil.copytree(ROOT / "scripts", repo / "scripts")
    for path in (*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml"):
        shutil.copy(path, repo)
    (tmp_path / "bin").mkdir()
    for name in ("python", "compute-sanitizer"):
        (tmp_path / "bin" / name).write_text(FAKE_PROGRAM)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(no_gpu=0, failing="nothing"):
        variables = {"VIRTUAL_ENV": tmp_path, "CALLS": calls, "NO_GPU": no_gpu, "FAILING": failing}
        done = subprocess.run(
            ["sh", "scripts/gpu_check.sh"],
            cwd=repo,
            capture_output=True,
            text=True,
            env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        )
        return done, calls.read_text()

    return run


def test_every_step_runs_with_all_that_the_tests_need(gpu_check):
    done, calls = gpu_check()
    assert done.returncode == 0 and "FAILED" not in done.stdout and done.stderr == ""
    assert "-r requirements-test.txt -r requirements-hf.txt" in calls
    for step in (
        "pytest -q tests/ops\n",
        "--tool racecheck",
        "pytest -q tests --accelerator gpu",
        "wkv6.py --device cuda",
    ):
        assert step in calls


@pytest.mark.parametrize("step", ["cuda.unavailable", "--tool memcheck", "--accelerator gpu", "benchmarks/wkv6.py"])
def test_a_failing_step_does_not_stop_the_others(gpu_check, step):
    done, calls = gpu_check(failing=step)
    assert done.returncode == 1 and done.stdout.count("FAILED: see") == 1
    assert "wkv6.py --device cuda" in calls


def test_without_a_gpu_nothing_is_tried(gpu_check):
    done, calls = gpu_check(no_gpu=2)
    assert done.returncode == 2 and "machine with an NVIDIA GPU" in done.stdout and "pytest" not in calls
