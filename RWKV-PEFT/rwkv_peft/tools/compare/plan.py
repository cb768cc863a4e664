"""The order of runs: a sweep of learning rates for each method, over a grid, then the other seeds at its best rate;
and the size of a method."""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...cli.parser import above_zero

DIGITS = (1, 3)  # of each decade
LOWEST, HIGHEST = -16, 2  # 1e-8 and 1e1: a sweep does not go beyond them


def rate_of(number: int) -> float:
    """The learning rate of a number: -6 is 1e-3, -5 is 3e-3."""
    decade, place = divmod(number, len(DIGITS))
    return float(f"{DIGITS[place]}e{decade}")


def nearest_to(value: float) -> int:
    """The number of the learning rate that is nearest to a value."""
    return min(range(LOWEST, HIGHEST + 1), key=lambda number: abs(math.log(value / rate_of(number))))


def grid_rate(text: str) -> int:
    """The number of a learning rate on the grid; an argparse type, which refuses other rates."""
    value = above_zero(text)
    nearest = nearest_to(value)
    if value != rate_of(nearest):
        raise argparse.ArgumentTypeError(
            f"{text} is not on the grid of 1 and 3 times the powers of ten; take {rate_of(nearest):g}"
        )
    return nearest


class Size(NamedTuple):
    """A method's rank (0: none, for the whole model or its states), its mini_rank (0: none), the parameters that it
    trains with them, and those that --train_parts trains beside it."""

    rank: int
    mini_rank: int
    parameters: int
    beside: int = 0

    @property
    def trained(self) -> int:
        """All parameters that train."""
        return self.parameters + self.beside


class Cell(NamedTuple):
    """One run: its method, the number of its learning rate, its seed."""

    method: str
    rate: int
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, rate {rate_of(self.rate):g}, seed {self.seed}"

    @property
    def folder(self) -> str:
        return f"{self.method}-{rate_of(self.rate):g}-{self.seed}"


def best_rate(method: str, seed: int, losses: Mapping[Cell, float]) -> int | None:
    """The number of the rate of a method's lowest loss with a seed, the lower of two equal ones; None without a run."""
    tried = [cell for cell in losses if (cell.method, cell.seed) == (method, seed)]
    return min(tried, key=lambda cell: (losses[cell], cell.rate)).rate if tried else None


def next_cells(
    methods: Sequence[str], rates: Sequence[int], seeds: Sequence[int], losses: Mapping[Cell, float]
) -> list[Cell]:
    """The runs that are due, independent of each other; none if the comparison is complete.

    losses: the complete runs' validation losses, infinite if a run diverged. With the first seed each method runs all
    rates, and then the neighbours of its best rate until that lies between two that are worse or at the end of the
    grid. Only when all sweeps are done do the other seeds follow, at the best rate. Methods take turns, so that a
    comparison that is cut short is cut for all of them.
    """
    sweeps = [
        cell
        for method in methods
        for cell in (Cell(method, rate, seeds[0]) for rate in due_rates(method, rates, seeds[0], losses))
        if cell not in losses
    ]
    if sweeps:
        return sorted(sweeps, key=lambda cell: cell.rate)
    finals = [
        Cell(method, best, seed)
        for seed in seeds[1:]
        for method in methods
        if (best := best_rate(method, seeds[0], losses)) is not None
    ]
    return [cell for cell in finals if cell not in losses]


def due_rates(method: str, rates: Sequence[int], seed: int, losses: Mapping[Cell, float]) -> list[int]:
    """The rates that a sweep needs next, some of them done already."""
    if any(Cell(method, rate, seed) not in losses for rate in rates):
        return list(rates)
    best = best_rate(method, seed, losses)
    assert best is not None  # there are rates, and all of them are done
    return [rate for rate in (best - 1, best + 1) if LOWEST <= rate <= HIGHEST]
