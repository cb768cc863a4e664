"""The programs of scripts/gpu_check.sh on a GPU's driver that is emulated on a CPU: a CPU's tensors take the GPU's code
path, and each launch of a kernel is recorded, runs through the shim, or fails or finds no memory."""

import functools
import itertools
import json
import warnings
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from cuda_shim import shim
from programs import load

SMOKE = "smoke x070 --device cpu --tokens 24 --rank 16 --repeats 1 --batches packed --methods bat-in".split()
STEP = "--device cpu --shape 64x96x2 --vocab 64 --rank 8 --rounds 1".split()
ILLEGAL_ADDRESS = 700  # of CUDA's errors
models, kernels, budget = (load("benchmarks", f"gpu_{name}") for name in ("models", "kernels", "budget"))


@functools.cache
def kernels_of(name):
    """The shim's kernels of the family that has a kernel of this name."""
    return shim.build(next(family for family in kernels.FAMILIES if name in family.names))


@contextmanager
def on_gpu_path(launched, faults=(), real=True):
    """A context in which launches are put into a set, and run; faults: {part of a kernel's name: "fail", "drop" (not
    run) or "out of memory"}."""

    def run(_, name, arguments, blocks, stream):
        launched.add(name)
        fault = next((fault for part, fault in dict(faults).items() if part in name), "")
        if fault == "out of memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nof nothing")
        if fault == "fail":
            return ILLEGAL_ADDRESS
        return kernels_of(name).run(name, arguments, blocks, stream) if real and not fault else 0

    with patch.object(budget.Dropped, "run", run), budget.gpu_path():
        yield


def told(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("fault", ["", "drop", "fail"])
def test_smoke_finds_what_a_kernel_does(capsys, monkeypatch, fault):
    launched = set()
    faults = {"wkv7_backward": fault} if fault else {}
    # the truth beside it takes plain torch
    monkeypatch.setattr(models, "recorded", lambda here: on_gpu_path(Both(launched, here), faults))
    code = models.main(SMOKE)
    case, last = told(capsys)
    if not fault:
        assert code == 0 and case["right"] and case["repeated"] and set(case["kernels"]) == launched
        assert last["wrong"] == [] and not launched & set(last["kernels_not_launched"])
    else:
        assert code == 1 and last["wrong"] == ["bat-in packed"]
        assert not case.get("right") and (fault == "drop" or "failed with CUDA error 700" in case["failed"])
    assert all(any(part in name for name in launched) for part in ("wkv7_forward", "wkv7_backward"))


class Both(set):
    """A set whose members are put into two others."""

    def __init__(self, *others):
        super().__init__()
        self.others = others

    def add(self, name):
        for other in self.others:
            other.add(name)


def test_memory_that_does_not_suffice_costs_one_case_alone(capsys, monkeypatch):
    made = models.step_program.make_step

    def make(family, config, weights, method, kind, args):
        if args.batch == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nIt is full.")
        return made(family, config, weights, method, kind, args)

    monkeypatch.setattr(models.step_program, "make_step", make)
    assert models.main(["step", "x060", "--methods", "lora", *STEP, "--rows", "1x16", "2x16", "1x32"]) == 3
    first, full, last = told(capsys)
    assert first["rows"] == "1x16" and last["rows"] == "1x32" and min(first["ms"], last["ms"]) > 0
    assert full["rows"] == "2x16" and full["out_of_memory"] == "CUDA out of memory."
    assert "planned_gib" in first and first["host_us_a_block"] > 0


def test_a_step_takes_the_gpus_path(capsys):
    launched = set()
    with on_gpu_path(launched, real=False):
        assert models.main(["step", "x060", "--methods", "bat-in", *STEP, "--rows", "1x32"]) == 0
    assert any("wkv6_backward" in name for name in launched) and any("bone" in name for name in launched)


def test_lines_that_wait_for_the_gpu_are_named(monkeypatch):
    """set_sync_debug_mode has torch warn at each."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        warnings.warn("another matter", stacklevel=1)
        if modes == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    (line,) = models.waits_in(step)
    assert line.startswith(f"{__file__}:") and modes == ["warn", 0]


def wraps_around(function):
    """Make a function of rows wrong: some of its rows, the last among them, are computed from zeros."""
    return lambda x: function(x * torch.ones_like(x).index_fill(0, torch.tensor(len(x) - 1), float(len(x) == 1)))


@pytest.mark.parametrize("broken", [False, True])
def test_the_last_of_many_rows_must_be_what_it_is_alone(capsys, monkeypatch, broken):
    if broken:
        above = functools.partial(kernels.elementwise_above, wraps_around(torch.square), 1)
        monkeypatch.setattr(kernels, "ABOVE", {"relu_square": above})
    assert kernels.main(["above", "--quick"]) == int(broken)
    assert all(entry["right"] != broken and entry["elements"] > 4000 for entry in told(capsys))


def test_an_operation_that_is_wrong_is_found(capsys, monkeypatch):
    assert kernels.main(["check", "--quick"]) == 0
    right = told(capsys)
    assert len(right) == 4 and all(entry["right"] and entry["repeated"] for entry in right)
    factors = itertools.cycle((1, 1, 1.2))  # the truth's, plain torch's, ours
    monkeypatch.setitem(kernels.OPS, "relu_square", kernels.Op(lambda x: x * next(factors), ((2, kernels.T, 4),)))
    assert kernels.main(["check", "--quick", "--only", "relu_square"]) == 1
    assert not any(entry["right"] for entry in told(capsys))
