"""The runs of a comparison: methods of matched sizes, and their order, a sweep of learning rates for each method over a
grid, then the other seeds at its best rate."""

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...cli.errors import UserError
from ...cli.parser import above_zero
from ...config import AdapterConfig
from ..plan.activations import METHODS

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
    """A method's rank (0: none, for the whole model or its states), its mini_rank (0: none), and the number of
    parameters that train."""

    rank: int
    mini_rank: int
    trained: int


Layers = Counter[tuple[int, int]]  # {(out_features, in_features): number of layers}


def settings_of(method: str, rank: int, mini_rank: int) -> AdapterConfig:
    """The AdapterConfig of a method's size; the rank is its first setting, under any name."""
    sizes: dict[str, Any] = dict(zip(METHODS[method].sizes, (rank, mini_rank)))
    return AdapterConfig(**sizes)


def parameter_count(method: str, rank: int, mini_rank: int, layers: Layers) -> int:
    """The number of parameters that a method trains on layers."""
    settings = settings_of(method, rank, mini_rank)
    return sum(number * METHODS[method].trains(settings, *layer) for layer, number in layers.items())


def matched_size(method: str, wanted: int, layers: Layers) -> tuple[int, int]:
    """The (rank, mini_rank) with the number of parameters nearest to `wanted`; among equally near ones those that are
    nearest to each other, or without a mini_rank the lowest rank. Raises UserError if no rank fits."""
    outs = math.gcd(*(out_features for out_features, _ in layers))
    has_mini = "mini_rank" in METHODS[method].sizes
    found = [
        (rank, mini)
        for rank in range(1, max(map(max, layers)) + 1)
        for mini in ([width for width in range(1, outs + 1) if outs % width == 0] if has_mini else [0])
        if all(METHODS[method].fits(settings_of(method, rank, mini), *layer) for layer in layers)
    ]
    if not found:
        raise UserError(f"no rank of {method} fits every layer of this model; leave it out of --methods")

    def distance(size: tuple[int, int]) -> tuple[int, int]:
        rank, mini = size
        return abs(parameter_count(method, rank, mini, layers) - wanted), abs(rank - mini)

    return min(found, key=distance)


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
