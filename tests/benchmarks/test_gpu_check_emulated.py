"""scripts/gpu_check.sh's steps on an emulated driver, whose launches are recorded and whose failures are injected."""

import dataclasses
import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(*only, faults, real, without) -> (exit code, {step: (outcome, why)}, results, output)."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    emulated, program = importlib.import_module("gpu_emulated"), importlib.import_module("gpu_check")
    list_of_steps = importlib.import_module("gpu_check_steps")

    def run(*only, faults=(), real=False, without=()):
        driver = emulated.Driver(tmp_path / "launches", dict(faults), real)
        popen = SimpleNamespace(Popen=lambda command, **_: emulated.Process(command, driver), PIPE=0, STDOUT=0)
        monkeypatch.setattr(program, "subprocess", popen)
        monkeypatch.setattr(list_of_steps, "find_spec", lambda name: None if name in without else name)
        known = [dataclasses.replace(step, seconds=600) for step in list_of_steps.steps(tmp_path / "out", False)]
        monkeypatch.setattr(program, "steps", lambda *_, **__: known)
        code = program.main(["--output", str(tmp_path / "out"), "--minutes", "60", "--only", *only])
        lines = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
        results = [json.loads(line) for line in lines]
        outcomes = {entry["step"]: (entry["outcome"], entry["why"]) for entry in results if "outcome" in entry}
        return code, outcomes, [entry for entry in results if "outcome" not in entry], capsys.readouterr().out

    run.launches = lambda: {line.split()[0] for line in (tmp_path / "launches").read_text().splitlines()}
    return run


def test_smoke_finds_right_kernels_right_and_tells_which_it_launched(check):
    code, outcomes, results, _ = check("smoke x070", real=True)
    assert (code, outcomes) == (0, {"smoke x070": ("measured", "")})
    case, last = results
    assert case["right"] and case["repeated"] and set(case["kernels"]) == check.launches()
    assert any("wkv7_forward" in name for name in case["kernels"])
    assert any("wkv7_backward" in name for name in case["kernels"])
    assert last["wrong"] == [] and not set(case["kernels"]) & set(last["kernels_not_launched"])


def test_smoke_finds_a_kernel_that_did_nothing(check):
    code, outcomes, results, _ = check("smoke x070", real=True, faults={"wkv7_backward": "drop"})
    assert code == 1 and outcomes["smoke x070"][0] == "failed"
    assert not results[0]["right"] and results[1]["wrong"] == ["x070 bat-in packed"]


def test_smoke_tells_a_launch_that_failed(check):
    code, outcomes, results, _ = check("smoke x070", faults={"wkv7_forward": "fail"})
    assert code == 1 and outcomes["smoke x070"][0] == "failed"
    assert "failed with CUDA error 700" in results[0]["failed"]


@pytest.mark.parametrize("fault, why", [("fail", "exit code 1"), ("out of memory", "out of memory")])
def test_a_step_that_breaks_costs_no_other(check, fault, why):
    """RWKV-7's kernels break, and RWKV-6's steps, which come after them, still run."""
    names = "step x070 bat-in", "step x070 lora", "step x060 bat-in"
    code, outcomes, results, out = check(*names, faults={"wkv7_backward": fault})
    assert code == 1 and list(outcomes) == list(names)
    for name in names[:-1]:
        assert outcomes[name][0] == "failed" and outcomes[name][1].startswith(why)
    assert outcomes[names[-1]] == ("measured", "")
    measured = next(entry for entry in results if entry["step"] == names[-1] and "ms" in entry)
    assert measured["ms"] > 0 and measured["host_us_a_block"] > 0 and "planned_gib" in measured
    if fault == "out of memory":
        broken = next(entry for entry in results if entry["step"] == names[0])
        assert broken["out_of_memory"] == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert out.index("measured: 1 of") < out.index(f"failed: {len(names) - 1} of")
    assert any("wkv6_backward" in name for name in check.launches())


def test_decoding_is_measured_where_the_engine_is_missing(check):
    code, outcomes, results, out = check("engine x070", "decode x070", without=("deepspeed",))
    assert code == 0
    assert outcomes == {"engine x070": ("left out", "no deepspeed"), "decode x070": ("measured", "")}
    kinds = [(entry["weights"], entry["sequences"], entry["graphs"]) for entry in results]
    assert kinds == [*itertools.product(("bf16", "int8"), (1, 2), (True, False))]
    assert all(entry["tokens_per_s"] > 0 for entry in results)
    assert "left out: 1 of 2\n    engine x070: no deepspeed" in out
