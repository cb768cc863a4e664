"""scripts/gpu_check.sh with stand-ins for its programs: which steps run, and what it writes when."""

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
PROGRAMS = ("compute-sanitizer",)


@pytest.fixture
def check(tmp_path):
    """check(*flags, programs, failing, lasting, code) -> the finished process."""
    repo = tmp_path / "repo"
    programs_here = ("gpu_check", "gpu_check_steps", "common")
    for name in ("scripts/gpu_check.sh", *(f"benchmarks/{each}.py" for each in programs_here)):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repo / name)
    stand_in = STAND_IN.format(python=sys.executable)
    for name in ("probe", "smoke", "ops", "steps", "engine", "decode", "above"):
        (repo / "benchmarks" / f"gpu_{name}.py").write_text(stand_in)
    (repo / "benchmarks" / "step.py").write_text(stand_in)
    for module in (
        "pytest",
        "numpy",
        "tqdm",
        "torch",
        "deepspeed",
        "lightning",
        "safetensors",
        "hypothesis",
        "bitsandbytes",
    ):
        (repo / "RWKV-PEFT" / module).mkdir(parents=True)
        (repo / "RWKV-PEFT" / module / "__init__.py").touch()
        (repo / "RWKV-PEFT" / module / "__main__.py").write_text(stand_in)

    def start(*flags, programs=PROGRAMS, failing="nothing", lasting="nothing", code=1, without=()):
        for module in without:
            shutil.rmtree(repo / "RWKV-PEFT" / module)
        folder = tmp_path / "bin"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "python3").write_text(f"#!/bin/sh\nexec '{sys.executable}' -S \"$@\"\n")  # without what is installed
        (folder / "python3").chmod(0o755)
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
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    run.start = start
    run.calls = lambda: (tmp_path / "calls").read_text()
    run.results = lambda: [
        json.loads(line) for line in (repo / "out" / "gpu_check" / "results.jsonl").read_text().splitlines()
    ]
    return run


def outcomes(check):
    """{step: "measured", or its outcome and why}, in order."""
    return {
        entry["step"]: f"{entry['outcome']}: {entry['why']}" if entry["why"] else entry["outcome"]
        for entry in check.results()
        if "outcome" in entry
    }


def exceptions(check):
    return {name: outcome for name, outcome in outcomes(check).items() if outcome != "measured"}


def test_every_step_runs_and_what_matters_comes_first(check):
    done = check()
    assert (done.returncode, done.stderr) == (0, "")
    names = list(outcomes(check))
    steps = [f"step {version} {method}" for version in ("x070", "x060") for method in ("bat-in", "bone", "lora")]
    first = ["card", "build", "smoke x070", "smoke x060", "memcheck", *steps, "engine x070", "engine x060"]
    assert names[:15] == [*first, "decode x070", "decode x060"]
    settings = ("stage 2", "stage 3", "stage 2 offload", "stage 3 offload", "grad_cp", "compile", "nf4", "int8")
    for case in ("large", *settings, "fp32", "infctx", "two GPUs"):
        assert f"engine {case}" in names
    assert {"above 2^31", "every kernel", "kernels", "profile", "sanitizer mix", "tests"} <= set(names)
    assert exceptions(check) == {}
    assert {entry["step"] for entry in check.results() if entry.get("found") == 1} == set(names)
    for words in ("gpu_steps.py x060 lora", "gpu_engine.py x060", "--part resume", "--part merge", "--rows 8x4096"):
        assert words in check.calls()
    for words in ("kns=wkv6", "kns=mix", "--tool racecheck"):
        assert words in check.calls()
    assert "tests --accelerator gpu" not in check.calls()
    shown = done.stdout.splitlines()
    assert shown[shown.index(f"measured: {len(names)} of {len(names)}") + 1] == "    card"


def test_full_runs_the_suite_and_only_what_is_named(check):
    assert check("--full", "--only", "card", "decode", "suite").returncode == 0
    assert list(outcomes(check)) == ["card", "decode x070", "decode x060", "suite"]
    assert "tests --accelerator gpu" in check.calls()


@pytest.mark.parametrize(
    "code, outcome",
    [
        (1, "failed: exit code 1"),
        (2, "failed: exit code 2"),
        (3, "failed: out of memory"),
        (4, "left out: this machine cannot"),
    ],
)
def test_a_step_that_fails_does_not_stop_the_others(check, code, outcome):
    done = check("--only", "smoke", "step", failing="gpu_steps.py x070 bone", code=code)
    assert done.returncode == int(code != 4)
    assert len(outcomes(check)) == 8 and list(exceptions(check)) == ["step x070 bone"]
    assert exceptions(check)["step x070 bone"].startswith(outcome)
    assert f"    step x070 bone: {outcome.partition(': ')[2]}" in done.stdout


def test_a_tool_that_fails_does_not_stop_other_programs(check):
    assert check("--only", "memcheck", "sanitizer", failing="kns=mix").returncode == 1
    assert len(outcomes(check)) == 7 and list(exceptions(check)) == ["sanitizer mix"]


def test_what_a_machine_lacks_is_left_out_and_told(check):
    done = check("--only", "memcheck", "engine", "card", programs=(), without=("deepspeed", "lightning"))
    assert done.returncode == 0
    left = exceptions(check)
    assert left.pop("memcheck") == "left out: no compute-sanitizer"
    assert set(left.values()) == {"left out: no deepspeed, lightning"} and len(left) == 14
    assert "    engine stage 3 offload: no deepspeed, lightning" in done.stdout


def test_with_torch_alone_each_step_that_needs_more_is_left_out_by_name(check):
    lacking = ("deepspeed", "lightning", "safetensors", "numpy", "tqdm", "pytest", "hypothesis", "bitsandbytes")
    assert check(without=lacking).returncode == 0
    left = exceptions(check)
    assert left["smoke x070"] == "left out: no numpy" and left["step x060 bone"] == "left out: no numpy, tqdm"
    for name in set(outcomes(check)) - {"card"}:
        kind = name.split()[0]
        runs = kind in ("build", "decode", "above", "every", "kernels", "profile") or name == "sanitizer mix"
        assert name not in left if runs else kind not in ("smoke", "step", "more", "engine", "tests") or name in left


def test_packages_of_tests_are_installed_behind_the_first_checks_unless_offline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu_check_steps import steps

    names = [step.name for step in steps(Path("folder"), full=False, offline=False)]
    assert "packages" not in [step.name for step in steps(Path("folder"), full=False)]
    needing = [step.name for step in steps(Path("folder"), full=True, offline=False) if "pytest" in step.modules]
    assert names.index("engine x060") < names.index("packages") < min(map(names.index, ["tests", "engine nf4"]))
    assert needing == ["tests", "suite"]


def test_without_a_gpu_nothing_more_is_tried(check):
    done = check(failing="gpu_probe.py card", code=2)
    assert done.returncode == 2 and "machine with an NVIDIA GPU" in done.stdout
    assert check.calls() == "gpu_probe.py card\n"


def test_time_ends_a_step_and_those_after_it(check):
    done = check("--minutes", "0.1", "--only", "smoke", "kernels", lasting="gpu_smoke.py --generations x070")
    assert done.returncode == 1
    assert re.fullmatch(r"failed: stopped after \d s", outcomes(check)["smoke x070"])
    assert outcomes(check)["smoke x060"] == outcomes(check)["kernels"] == "left out: 0.1 minutes are over"
    assert done.stdout.index("failed: 1 of 3") < done.stdout.index("left out: 2 of 3")


def test_a_check_that_is_stopped_tells_what_it_has(check):
    process = check.start("--only", "card", "smoke", lasting="gpu_smoke.py --generations x070")
    wait_for(lambda: {"step": "smoke x070", "found": 1} in check.results())
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    told = out[out.index("measured: 1 of 3") :]
    assert "failed: 1 of 3\n    smoke x070: interrupted" in told
    assert "left out: 1 of 3\n    smoke x060: the check was stopped" in told


def wait_for(holds):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if holds():
                return
        except (FileNotFoundError, ValueError):  # of a line that is being written
            pass
        time.sleep(0.05)


def test_results_are_on_disk_while_a_step_goes_on(check):
    process = check.start("--only", "smoke", lasting="gpu_smoke.py")
    wait_for(check.results)
    assert check.results() == [{"step": "smoke x070", "found": 1}]
    process.send_signal(signal.SIGKILL)
    process.communicate()
