"""scripts/gpu_check.sh: its steps and their order, what it writes when, and a whole run of them on a CPU."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import product

import pytest

from programs import ROOT, load
from training.runs import finish, start

program = load("benchmarks", "gpu_check")
Step = program.Step
TOLD = "echo log; echo '{{\"found\": 1}}'; echo '| a | row |'; {}"
# What is not in torch's own requirements.
OTHERS = "numpy tqdm deepspeed lightning safetensors pytest hypothesis bitsandbytes fastapi uvicorn pyarrow psutil yaml"


def step(name, then="exit 0", seconds=60, **others):
    return Step(name, seconds, (("sh", "-c", TOLD.format(then)),), **others)


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(steps, *flags) -> (exit code, {step: "measured", or outcome and why}, results, output)."""

    def run(steps, *flags):
        monkeypatch.setattr(program, "STEPS", tuple(steps))
        monkeypatch.setattr(program, "find_spec", lambda name: None if name.startswith("no_") else name)
        code = program.main(["--offline", "--output", str(tmp_path), *flags])
        results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        outcomes = {
            entry["step"]: ": ".join(filter(None, (entry["outcome"], entry["why"])))
            for entry in results
            if "outcome" in entry
        }
        return code, outcomes, [entry for entry in results if "outcome" not in entry], capsys.readouterr().out

    return run


def test_what_matters_comes_first_and_all_of_it_takes_ten_minutes(capsys):
    names = [each.name for each in program.STEPS if not each.full]
    kinds = list(dict.fromkeys(name.split(" x0")[0] for name in names))
    assert kinds == [
        *("card", "build", "smoke", "step", "engine", "kernels"),
        *("two GPUs", "a rank that raises", "stage 3", "above 2^31", "RWKV-7a", "host memory"),
        *("decode", "top_p", "rewards", "serve", "nf4", "large"),
    ]
    (eight,) = (each for each in program.STEPS if each.name == "step x070 of 8 rows")
    assert not eight.full and "8x4096" in eight.sizes
    assert program.main(["--list"]) == 0  # with what it installs
    table = capsys.readouterr().out
    assert int(re.search(r"\| in all \| (\d+) \|", table)[1]) <= 600
    assert f"\n\n{table}\n" in (ROOT / "docs" / "benchmarks" / "gpus.md").read_text(encoding="utf-8")


def test_packages_are_installed_behind_what_needs_none_and_never_offline(capsys):
    for flags, there in (([], True), (["--offline"], False)):
        program.main(["--list", *flags])
        names = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines()]
        assert ("packages" in names) == there
        if there:
            before = set(names[2 : names.index("packages")])
            listed = (each for each in program.STEPS if each.name in before)
            assert all({*each.modules} <= {*program.ENGINE, *program.RANKS} and not each.programs for each in listed)


@pytest.mark.parametrize(
    "then, code, outcome",
    [
        ("exit 0", 0, "measured"),
        ("exit 1", 1, "failed: exit code 1"),
        ("echo 'error: no room'; exit 2", 1, "failed: exit code 2, error: no room"),
        ("exit 3", 1, "failed: out of memory"),
        ("exit 4", 0, "left out: this machine cannot"),
        ("sleep 600", 1, "failed: stopped after 4 s"),
    ],
)
def test_a_step_that_fails_does_not_stop_the_others(check, then, code, outcome):
    steps = [step("card"), step("smoke a", then, 1 if "sleep" in then else 60), step("smoke b"), step("later")]
    assert check(steps, "--only", "smoke")[:2] == (code, {"smoke a": outcome, "smoke b": "measured"})
    found, outcomes, results, out = check(steps)
    assert found == code and list(outcomes) == ["card", "smoke a", "smoke b", "later"]
    assert {entry["step"] for entry in results if entry.get("found") == 1} == set(outcomes)
    assert {"step": "card", "row": "| a | row |"} in results
    assert "    smoke a" in out and f"measured: {3 + (outcome == 'measured')} of 4\n    card" in out


def test_no_output_of_a_step_ends_the_check(check):
    """Objects with keys that the check uses itself, a byte that is no UTF-8, and JSON too deep to read."""
    odd = """echo '{"step": 3}'; echo '{"self": 4}'
        printf '\\377\\n'; head -c 100000 /dev/zero | sed 's/\\x0/{"a":/g'; echo"""
    code, outcomes, results, _ = check([step("card", odd), step("later")])
    assert (code, outcomes) == (0, {"card": "measured", "later": "measured"})
    assert {"step": "card", "result": {"step": 3}} in results and {"step": "card", "self": 4} in results


def test_what_a_step_leaves_behind_holds_no_other(check, tmp_path):
    """A process in a session of its own that keeps the output open."""
    pid = tmp_path / "pid"
    left = f"setsid sh -c 'echo $$ >{pid}; exec sleep 600' & while [ ! -s {pid} ]; do sleep 0.1; done"
    code, outcomes, _, _ = check([step("card", left), step("later")])
    assert (code, outcomes) == (0, {"card": "measured", "later": "measured"})
    os.kill(int(pid.read_text()), signal.SIGKILL)  # it is still there


def test_what_a_machine_lacks_is_left_out_by_name(check):
    steps = [step("card"), step("a", modules=("no_numpy", "json")), step("b", programs=("no-such-tool",))]
    code, outcomes, _, out = check(steps)
    assert code == 0
    assert outcomes == {"card": "measured", "a": "left out: no no_numpy", "b": "left out: no no-such-tool"}
    assert "left out: 2 of 3\n    a: no no_numpy" in out


def test_without_a_gpu_nothing_more_is_tried(check):
    code, outcomes, _, out = check([step("card", "exit 2"), step("build")])
    assert (code, list(outcomes)) == (2, ["card"]) and "machine with an NVIDIA GPU" in out


def test_time_leaves_out_the_steps_behind_it_but_not_with_full(check):
    steps = [step("card"), step("more", full=True)]
    over = "left out: 0.01 minutes are over"
    assert check(steps, "--minutes", "0.01")[1] == {"card": over, "more": over}
    more = check(steps, "--minutes", "0.9")[1]["more"]
    assert re.fullmatch("left out: it needs 60 s, and [0-9]+ of 0.9 minutes are left", more)
    assert check(steps)[1] == {"card": "measured", "more": "measured"}  # while minutes last
    assert check(steps, "--minutes", "0.01", "--full")[1] == {"card": "measured", "more": "measured"}


def test_results_are_on_disk_at_once_and_a_stopped_check_prints_what_it_has(tmp_path):
    code = (
        "import gpu_check; gpu_check.STEPS = (gpu_check.Step('a', 60, (('echo', '{}'),), ()), gpu_check.Step("
        """'b', 60, (("sh", "-c", "echo '{\\"found\\": 1}'; sleep 600"),)), gpu_check.Step('c', 60, ()));"""
        f"gpu_check.main(['--offline', '--output', {str(tmp_path)!r}])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "found" in line:
            break
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"step": "b", "found": 1}
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert "measured: 1 of 3\n    a\nfailed: 1 of 3\n    b: interrupted\nleft out: 1 of 3\n    c: the check was" in out


def without(folder, modules):
    """An environment of processes that find none of these modules."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules.split()!r}))\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "RWKV-PEFT", ROOT / "benchmarks")))}


def test_steps_for_which_torch_is_enough_run_with_torch_alone(tmp_path):
    """Each program that a step without further modules starts, as its smallest run."""
    commands = [words for each in program.STEPS if not each.modules for words in each.commands]
    alone = {words[:2] for words in commands if words[0].startswith("gpu_")}
    assert len(alone) >= 6
    for name in {name for name, _ in alone}:
        version = ["x070"] if name == "gpu_models.py" else []
        parts = [[part, *version, "--quick"] for file, part in sorted(alone) if file == name]
        code = f"import sys, {name[:-3]} as program; sys.exit(any([program.main(argv) for argv in {parts}]))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=without(tmp_path, OTHERS), capture_output=True, text=True)
        assert done.returncode == 0, (parts, done.stderr)


def test_one_device_needs_no_package_of_ranks(tmp_path):
    plain = {each.name for each in program.STEPS if not {*program.RANKS} & {*each.modules}}
    assert {"engine x070", "engine x060", "RWKV-7a", "rewards", "compile", "large", "serve"} <= plain
    assert not {"two GPUs", "a rank that raises", "stage 3", "test suite"} & plain
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_engine.py"), "large", "--quick"]
    done = subprocess.run(command, env=without(tmp_path, "deepspeed hjson pydantic"), capture_output=True, text=True)
    assert done.returncode == 0 and '"engine": "large"' in done.stdout, done.stderr


def test_offline_takes_the_python_at_hand_and_installs_nothing(tmp_path):
    repo, calls = tmp_path / "repo", tmp_path / "calls"
    for name in ("scripts", "benchmarks"):
        (repo / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "gpu_check.sh", repo / "scripts")
    (repo / "scripts" / "setup.sh").write_text('echo setup >>"$CALLS"; python=python3\n')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text('#!/bin/sh\necho "$*" >>"$CALLS"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CALLS": str(calls)}
    run = f"{repo}/benchmarks/gpu_check.py"
    for flags, expected in (
        (["--offline", "--only", "card"], [f"{run} --offline --only card"]),
        (["--only", "card"], ["setup", f"{run} --only card"]),
        (["--list"], [f"{run} --list"]),
    ):
        calls.unlink(missing_ok=True)
        subprocess.run(["sh", "scripts/gpu_check.sh", *flags], cwd=repo, env=environment, check=True)
        made = calls.read_text().splitlines()
        assert len(made) == len(expected) and all(word in line for word, line in zip(expected, made))


# One of each kind; test_benchmarks.py runs the programs of "serve" and "engine beside a bare loop".
EMULATED = "card;build;smoke x070;step x060 lora;engine x070;two GPUs;a rank that raises;above 2^31;RWKV-7a"
EMULATED += ";host memory;decode x070;top_p;rewards;compile;large;profile x070"


def test_the_whole_check_runs_on_a_cpu_with_tiny_sizes(tmp_path, warm_python):
    """Every program and case of it: --quick."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--quick", "--output", str(tmp_path)]
    out, _ = finish(start([*command, "--only", *EMULATED.split(";")], CUDA_VISIBLE_DEVICES=""), 0)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    outcomes = {entry["step"]: entry["outcome"] for entry in results if "outcome" in entry}
    assert set(outcomes.values()) == {"measured"} and len(outcomes) == 16, out
    assert len([entry for entry in results if {"operation", "calls", "us"} <= entry.keys()]) == 30
    found = {entry["engine"]: entry for entry in results if "engine" in entry}
    assert {(each["draw"], each["rows"]) for each in results if "draw" in each} == {
        *product(("sorted", "selected"), (1, 64))
    }
    assert {*found["rewards"]["drawn_tokens_per_s"]} == {"recorded", "plain"}
    assert found["rewards"]["same_first_answers"] == "64 of 64"
    assert found["x070"]["merged_and_checked"] and found["compile"]["agree"]
    assert found["a rank that raises"]["exit_code"] == 1 and found["a rank that raises"]["told"]
    assert found["host memory"]["grown_gib"] < 0.5
