"""Ranks are matched to one number of parameters; every sweep ends with its best rate between two worse ones, for all
methods alike."""

import argparse
import math

import pytest

from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.compare.command import Layers, fits, matched_size, parameter_count
from rwkv_peft.tools.compare.plan import HIGHEST, LOWEST, Cell, best_rate, grid_rate, next_cells, rate_of


def finish_all(methods, rates, seeds, loss):
    """Run whatever is due, with loss(cell) as its result -> ({cell: loss}, the number of rounds)."""
    losses, rounds = {}, 0
    while cells := next_cells(methods, rates, seeds, losses):
        assert len(set(cells)) == len(cells) and not losses.keys() & set(cells)
        losses |= {cell: loss(cell) for cell in cells}
        rounds += 1
    return losses, rounds


@pytest.mark.parametrize("best", [LOWEST, -9, -5, 0, HIGHEST])
@pytest.mark.parametrize("rates", [[-6], [-8, -7, -6], [-14, -2]])
def test_a_sweep_ends_where_both_neighbours_of_its_best_rate_are_worse(best, rates):
    losses, _ = finish_all(["bone"], rates, [42], lambda cell: abs(cell.rate - best))
    assert best_rate("bone", 42, losses) == best
    assert all(Cell("bone", rate, 42) in losses for rate in (best - 1, best + 1) if LOWEST <= rate <= HIGHEST)


def test_rates_at_which_a_run_diverges_are_worse_than_any():
    losses, _ = finish_all(["bone"], [-2, -1], [42], lambda cell: math.inf if cell.rate > -6 else -cell.rate)
    assert best_rate("bone", 42, losses) == -6


def test_the_other_seeds_follow_all_sweeps_at_the_best_rate_alone():
    best = {"bone": -6, "lora": -3}
    losses, _ = finish_all(list(best), [-6, -5], [1, 2, 3], lambda cell: abs(cell.rate - best[cell.method]))
    others = {cell for cell in losses if cell.seed != 1}
    assert others == {Cell(method, rate, seed) for method, rate in best.items() for seed in (2, 3)}
    sweeping = {cell: loss for cell, loss in losses.items() if cell.seed == 1 and cell != Cell("lora", -2, 1)}
    assert next_cells(list(best), [-6, -5], [1, 2, 3], sweeping) == [Cell("lora", -2, 1)]


def test_methods_take_turns():
    assert next_cells(["bone", "lora"], [-6, -5], [1], {}) == [
        Cell(method, rate, 1) for rate in (-6, -5) for method in ("bone", "lora")
    ]


def test_rates_are_written_as_they_are_read():
    assert [rate_of(number) for number in (-6, -5, -4, 0, 1)] == [0.001, 0.003, 0.01, 1.0, 3.0]
    numbers = range(LOWEST, HIGHEST + 1)
    assert [grid_rate(f"{rate_of(number):g}") for number in numbers] == list(numbers)


@pytest.mark.parametrize("text, message", [("2e-3", "take 0.003"), ("0.0010001", "take 0.001"), ("0", "not above 0")])
def test_rates_off_the_grid_are_refused_with_the_nearest(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        grid_rate(text)


LAYERS = Layers([(64, 64), (64, 64), (224, 64), (64, 224)])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wanted", [1, 5000, 10**9])
def test_no_rank_that_fits_is_nearer(name, wanted):
    method = METHODS[name]
    size = matched_size(method, wanted, LAYERS)
    assert fits(method, size.rank, size.mini_rank, LAYERS)
    assert size.parameters == parameter_count(method, size.rank, size.mini_rank, LAYERS)
    others = [
        parameter_count(method, rank, size.mini_rank, LAYERS)
        for rank in range(1, 225)
        if fits(method, rank, size.mini_rank, LAYERS)
    ]
    assert abs(size.parameters - wanted) == min(abs(other - wanted) for other in others)


def test_counts_are_those_of_the_tensors_that_train():
    assert parameter_count(METHODS["bone"], 8, 0, LAYERS) == 8 * (64 + 64 + 224 + 64)
    assert parameter_count(METHODS["bat-in"], 8, 0, LAYERS) == 8 * (64 + 64 + 64 + 224)
    assert parameter_count(METHODS["pissa"], 4, 0, LAYERS) == 4 * (4 * 64 + 2 * (64 + 224))
    assert matched_size(METHODS["lora"], 8 * 416, LAYERS)[:2] == (4, 0)


def test_a_model_that_no_rank_fits_is_told(monkeypatch):
    monkeypatch.setattr("rwkv_peft.tools.compare.command.fits", lambda *rest: False)
    with pytest.raises(UserError, match="no rank of bat-out fits every layer"):
        matched_size(METHODS["bat-out"], 100, LAYERS)
