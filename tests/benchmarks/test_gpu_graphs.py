"""benchmarks/gpu_graphs.py, which needs a GPU, on graphs that a CPU emulates: its output, and its failures."""

import importlib
import json
from pathlib import Path

import pytest

from rwkv_peft.training.step import graphs
from training.graphs_emulated import emulate

SMALL = "--generations x070 --shape 64x96x2 --tokens 5 --vocab 30 --rank 8 --rounds 1".split()


@pytest.fixture
def program(monkeypatch):
    emulate(monkeypatch.setattr)
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("gpu_graphs")


def test_graphs_give_the_losses_of_blocks_that_run(program, capsys):
    assert program.main(SMALL, device="cpu") == 0
    plain, packed = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (plain["generation"], plain["method"], plain["rows"], packed["rows"]) == (
        "RWKV-7",
        "bat-in",
        "plain",
        "packed",
    )
    for found in (plain, packed):
        assert found["same_bits"] and found["difference"] == 0
        assert found["eager_ms"] > 0 and found["graphs_ms"] > 0


def test_losses_that_differ_fail(program, capsys, monkeypatch):
    replay = graphs.BlockGraphs.replay_forward
    monkeypatch.setattr(
        graphs.BlockGraphs, "replay_forward", lambda self, x, bounds: 3 * replay(self, x.flip(1), bounds)
    )
    assert program.main([*SMALL, "--rows", "plain"], device="cpu") == 1
    assert json.loads(capsys.readouterr().out)["difference"] > 0.01
