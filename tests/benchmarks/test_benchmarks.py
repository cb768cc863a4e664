"""Each benchmark runs: its smallest run, which --quick asks for, ends well. No timing is judged."""

import os
import re
import sys

import pytest

from programs import ROOT
from training.runs import finish, start

FOLDER = ROOT / "benchmarks"
ELSEWHERE = {"common", "gpu_check", "gpu_kernels", "gpu_models", "gpu_engine"}  # no program; run by test_gpu_check.py
PROGRAMS = sorted({path.stem for path in FOLDER.glob("*.py")} - ELSEWHERE)
ARGUMENTS = {"bits": ("{folder}/bits.json",)}
NEEDS = {"hf": "trl", "hf_trainers": "trl", "grpo": "trl", "turns": "trl", "generate": "xllamacpp", "data": "rwkv"} | {
    "prove": "rwkv"
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_its_smallest_run_ends_well(name, tmp_path, warm_python, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = [word.format(folder=tmp_path) for word in ARGUMENTS.get(name, ())]
    process = start([sys.executable, str(FOLDER / f"{name}.py"), *words, "--quick"], CUDA_VISIBLE_DEVICES="")
    out, _ = finish(process, 0)
    assert out.strip() and not os.listdir(FOLDER).count("out")
    if name == "faults":  # each attack that is tried hits
        assert all(int(hit) or not int(tried) for tried, hit in re.findall(r"\| (\d+) \| (\d+) \| 0 \|", out))


@pytest.mark.parametrize("name", sorted({*PROGRAMS, *ELSEWHERE} - {"common"}))
def test_its_head_has_its_command(name):
    head = (FOLDER / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    assert f"benchmarks/{name}.py" in head or f"scripts/{name}.sh" in head


@pytest.mark.parametrize("name, missing", [("serve", "fastapi, llguidance"), ("generate", "gguf")])
def test_packages_that_are_missing_are_named(name, missing, benchmark, monkeypatch, capsys):
    program = benchmark(name)
    monkeypatch.setattr("common.find_spec", lambda module: None if module in missing.split(", ") else module)
    monkeypatch.setattr(sys, "argv", [name, "--quick"] + ["--weights", "int8"] * (name == "generate"))
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 4 and f"error: {missing}: not installed; sh scripts/setup.sh" in capsys.readouterr().err
