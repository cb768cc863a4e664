"""methods.py: a sweep ends around its best rate, all methods alike, and sizes are the nearest."""

import math
from collections import Counter

import pytest

LAYERS = Counter([(64, 64), (64, 64), (224, 64), (64, 224)])


@pytest.fixture(scope="module")
def methods(benchmark):
    return benchmark("methods")


@pytest.fixture
def finish_all(methods):
    def finish(names, rates, seeds, loss):
        """Run whatever is next, with loss(cell) as its result -> {cell: loss}."""
        losses = {}
        while cells := methods.next_cells(names, rates, seeds, losses):
            assert len(set(cells)) == len(cells) and not losses.keys() & set(cells)
            losses |= {cell: loss(cell) for cell in cells}
        return losses

    return finish


@pytest.mark.parametrize("place", [0, 7, 11, -1])
@pytest.mark.parametrize("begun", [[10], [8, 9, 10], [2, 14]])
def test_a_sweep_ends_where_both_neighbours_of_its_best_rate_are_worse(methods, finish_all, place, begun):
    grid = methods.GRID
    best = grid[place]
    losses = finish_all(["bone"], [grid[n] for n in begun], [42], lambda cell: abs(math.log(cell.rate / best)))
    assert methods.best_rate("bone", 42, losses) == best
    place %= len(grid)
    assert set(grid[max(place - 1, 0) : place + 2]) <= {cell.rate for cell in losses}


def test_rates_at_which_a_run_diverges_are_worse_than_any(methods, finish_all):
    losses = finish_all(["bone"], [0.1, 0.3], [42], lambda cell: math.inf if cell.rate > 1e-3 else -cell.rate)
    assert methods.best_rate("bone", 42, losses) == 1e-3


def test_methods_take_turns_and_the_other_seeds_follow_all_sweeps_at_the_best_rate_alone(methods, finish_all):
    cell_of, best = methods.Cell, {"bone": 1e-3, "lora": 3e-2}
    assert methods.next_cells(["bone", "lora"], [1e-3, 3e-3], [1, 2], {}) == [
        cell_of(method, rate, 1) for rate in (1e-3, 3e-3) for method in ("bone", "lora")
    ]
    losses = finish_all(list(best), [1e-3], [1, 2, 3], lambda cell: abs(math.log(cell.rate / best[cell.method])))
    others = {cell for cell in losses if cell.seed != 1}
    assert others == {cell_of(method, rate, seed) for method, rate in best.items() for seed in (2, 3)}
    sweeping = {cell: loss for cell, loss in losses.items() if cell.seed == 1 and cell != cell_of("lora", 1e-1, 1)}
    assert methods.next_cells(list(best), [1e-3], [1, 2, 3], sweeping) == [cell_of("lora", 1e-1, 1)]


@pytest.mark.parametrize("wanted", [1, 5000, 10**9])
def test_no_rank_that_fits_is_nearer(methods, wanted):
    for name, method in methods.METHODS.items():
        rank, mini = methods.matched_size(name, wanted, LAYERS)
        distances = [
            abs(methods.parameter_count(name, other, mini, LAYERS) - wanted)
            for other in range(1, 225)
            if all(method.fits(methods.AdapterConfig(rank=other, mini_rank=mini), *layer) for layer in LAYERS)
        ]
        assert abs(methods.parameter_count(name, rank, mini, LAYERS) - wanted) == min(distances)
