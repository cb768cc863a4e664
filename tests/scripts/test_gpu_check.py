"""scripts/gpu_check.sh with stand-ins for what it runs: which steps run, what is written, and when."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What any program of a check is here: it tells what it is called with, prints a result and a line that is none, and
# fails or lasts where its arguments have the words.
STAND_IN = """#!{python}
import os, sys, time
words = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
open(os.environ["CALLS"], "a").write(words + "\\n")
print("a line of a log")
print('{{"found": 1}}', flush=True)
if os.environ["LASTING"] in words:
    time.sleep(60)
sys.exit(int(os.environ["CODE"]) if os.environ["FAILING"] in words else 0)
"""
PROGRAMS = ("nvcc", "compute-sanitizer", "ncu")


@pytest.fixture
def check(tmp_path):
    """check(*flags, programs, failing, lasting, code) -> the finished process."""
    repo = tmp_path / "repo"
    for name in ("scripts/gpu_check.sh", "benchmarks/gpu_check.py"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repo / name)
    stand_in = STAND_IN.format(python=sys.executable)
    for name in ("benchmarks/gpu_probe.py", "benchmarks/gpu_graphs.py", "benchmarks/step.py", "demo/task.py"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(stand_in)
    for module in ("rwkv_peft", "pytest", "torch", "deepspeed", "lightning", "safetensors", "hypothesis"):
        (repo / "RWKV-PEFT" / module).mkdir(parents=True)
        (repo / "RWKV-PEFT" / module / "__init__.py").touch()
        (repo / "RWKV-PEFT" / module / "__main__.py").write_text(stand_in)

    def start(*flags, programs=PROGRAMS, failing="nothing", lasting="nothing", code=1, without=()):
        for module in without:
            shutil.rmtree(repo / "RWKV-PEFT" / module)
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "python3").symlink_to(sys.executable)
        for name in programs:
            (folder / name).write_text(stand_in)
            (folder / name).chmod(0o755)
        names = {"CALLS": tmp_path / "calls", "FAILING": failing, "LASTING": lasting, "CODE": code}
        environment = {name: str(value) for name, value in names.items()}
        environment["PATH"] = f"{folder}:/usr/bin:/bin"
        command = ["sh", "scripts/gpu_check.sh", "--offline", *flags]
        inherited = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, cwd=repo, env=inherited | environment, **streams)

    def run(*flags, **settings):
        process = start(*flags, **settings)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    run.start = start
    run.calls = lambda: (tmp_path / "calls").read_text()
    run.results = lambda: [
        json.loads(line) for line in (repo / "out" / "gpu_check" / "results.jsonl").read_text().splitlines()
    ]
    return run


def outcomes(check):
    return {entry["step"]: entry["outcome"] for entry in check.results() if "outcome" in entry}


def test_every_step_runs_in_order_and_its_results_are_kept(check):
    done = check()
    assert (done.returncode, done.stderr) == (0, "")
    names = ["card", "build", "smoke", "kernels", "ncu", "step 1 x 1024", "step 1 x 4096", "step 8 x 4096"]
    assert list(outcomes(check)) == [*names, "graphs", "train", "ops", "sanitizer"]
    assert set(outcomes(check).values()) == {"passed"}
    assert {entry["step"] for entry in check.results() if entry.get("found") == 1} == set(outcomes(check))
    for words in (
        "gpu_probe.py smoke",
        "--batch 8 --tokens 4096",
        "gpu_graphs.py",
        "--resume",
        "--cuda_graphs 1",
        "--dataload pack",
        "merge --base_model",
        "-DGENERATION=7",
        "kernel_driver/mix.cu",
        "--tool racecheck",
    ):
        assert words in check.calls()
    assert "tests --accelerator gpu" not in check.calls()


def test_full_runs_the_suite_and_only_what_is_named(check):
    assert check("--full", "--only", "card", "suite").returncode == 0
    assert list(outcomes(check)) == ["card", "suite"] and "tests --accelerator gpu" in check.calls()


@pytest.mark.parametrize("failing, step", [("gpu_probe.py smoke", "smoke"), ("--tool memcheck", "sanitizer")])
def test_a_step_that_fails_does_not_stop_the_others(check, failing, step):
    done = check(failing=failing)
    assert done.returncode == 1
    failed = {name: outcome for name, outcome in outcomes(check).items() if outcome != "passed"}
    assert list(failed) == [step] and failed[step].startswith("failed: exit code 1, see ")


def test_what_a_machine_lacks_is_skipped_and_said(check):
    done = check(programs=("nvcc",), without=("deepspeed", "lightning"))
    assert done.returncode == 0
    skipped = {name: outcome for name, outcome in outcomes(check).items() if outcome != "passed"}
    assert skipped == {
        "ncu": "skipped: no ncu",
        "train": "skipped: no deepspeed, lightning",
        "sanitizer": "skipped: no compute-sanitizer",
    }


def test_without_a_gpu_nothing_more_is_tried(check):
    done = check(failing="gpu_probe.py card", code=2)
    assert done.returncode == 2 and "machine with an NVIDIA GPU" in done.stdout
    assert check.calls() == "gpu_probe.py card\n"


def test_time_ends_a_step_and_those_after_it(check):
    done = check("--minutes", "0.1", "--only", "smoke", "kernels", lasting="gpu_probe.py smoke")
    assert done.returncode == 1
    assert re.fullmatch("stopped after [56] s", outcomes(check)["smoke"])
    assert outcomes(check)["kernels"].startswith("skipped: 0.1 minutes are over")


def test_results_are_on_disk_while_a_step_goes_on(check):
    process = check.start("--only", "smoke", lasting="gpu_probe.py smoke")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if check.results():
                break
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    assert check.results() == [{"step": "smoke", "found": 1}]
    process.send_signal(signal.SIGKILL)
    process.communicate()
