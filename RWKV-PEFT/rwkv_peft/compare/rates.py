"""The grid of learning rates: 1 and 3 times the powers of ten, numbered by whole numbers."""

import argparse
import math

from ..cli import above_zero

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
