"""The programs of scripts/gpu_check.sh, which need a GPU, on a CPU: their output, and their failures."""

import importlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = "--device cpu --elements 4000 --tokens 20 --heads 2".split()


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_the_last_of_many_rows_is_what_it_is_alone(program, capsys):
    assert program("gpu_above").main(ROWS) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["operation"] for entry in found] == ["wkv6", "wkv7", "relu_square", "sigmoid_gate", "loss"]
    assert all(entry["right"] and entry["elements"] > 4000 for entry in found)


def test_an_operation_that_loses_its_last_row_is_wrong(program, capsys, monkeypatch):
    above, square = program("gpu_above"), torch.square
    monkeypatch.setitem(
        above.OPERATIONS, "relu_square", lambda rows, args: above.elementwise(wraps_around(square), 1, rows, args)
    )
    assert above.main([*ROWS, "--only", "relu_square"]) == 1
    assert not json.loads(capsys.readouterr().out)["right"]


def wraps_around(function):
    """Make a function of rows wrong: some of its rows, the last among them, are computed from zeros."""
    return lambda x: function(x * torch.ones_like(x).index_fill(0, torch.tensor(len(x) - 1), float(len(x) == 1)))


def test_lines_that_wait_for_the_gpu_are_told(program, monkeypatch):
    """set_sync_debug_mode has torch warn at each."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        warnings.warn("another matter", stacklevel=1)
        if modes == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    (line,) = program("gpu_steps").waits_in(step)
    assert line.startswith(f"{__file__}:") and modes == ["warn", 0]


def test_every_setting_of_the_engine_is_one_that_train_takes(program):
    """Checked by plan, which reads the same flags, for a GPU."""
    engine = program("gpu_engine")
    planned = {
        name: engine.planned_gib(["--load_model", engine.DEMO["x070"], *engine.SHORT, *engine.STEPS, 1, *flags])
        for name, flags in engine.SETTINGS.items()
    }
    assert len(planned) == 11 and all(size >= 0 for size in planned.values())
    assert planned["fp32"] > planned["grad_cp"]


def test_two_gpus_are_asked_of_a_machine_that_has_them(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert program("gpu_engine").main(["two GPUs", "--folder", str(tmp_path)]) == 4
    assert json.loads(capsys.readouterr().out) == {"engine": "two GPUs", "skipped": "one GPU is here"}


def test_memory_that_does_not_suffice_costs_one_number_of_rows_alone(program, capsys, monkeypatch):
    steps, made = program("gpu_steps"), program("step").make_step

    def make(family, config, weights, method, kind, args):
        if args.batch == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nIt is full.")
        return made(family, config, weights, method, kind, args)

    monkeypatch.setattr(steps, "step_program", SimpleNamespace(**{**vars(steps.step_program), "make_step": make}))
    small = "--device cpu --shape 64x96x2 --vocab 64 --rank 8 --rounds 1 --rows 1x16 2x16 1x32".split()
    assert steps.main(["x060", "lora", *small]) == 3
    first, full, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["rows"] == "1x16" and last["rows"] == "1x32" and min(first["ms"], last["ms"]) > 0
    assert full["rows"] == "2x16" and full["out_of_memory"] == "CUDA out of memory."
