"""Methods over random numbers that a file need not hold, because its seed gives them again, on every machine and in
every version.

They come from NumPy's legacy generator, with a stream that never changes (NEP 19). A matrix is drawn row by row, so
that layers of all widths share one: each layer takes the first rows that it needs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cli.errors import UserError
from ..config import AdapterConfig
from ..config.adapter import SEEDS
from .change import Params, Sum
from .method import Constants, Layer, register

FIRST = "first_row"  # in the params of some rows of the weight: the number of the first


def uniform(seed: int, stream: int, rows: int, columns: int) -> Tensor:
    """Numbers in [0, 1), float64 (n, columns), where n is the power of two that `rows` needs: bands of one matrix and
    layers of like widths are then few different draws, which callers cache."""
    import numpy as np  # not at the top, so that the other methods need torch alone

    count = 1 << (rows - 1).bit_length()
    return torch.from_numpy(np.random.RandomState([seed, stream]).random_sample((count, columns)))


def seeded(name: str, derive: Callable[[int, Layer], Params]) -> Constants:
    """Constants that are one seed, called `name`; derive(seed, layer) gives a layer's buffers beside it."""

    def make(weight: Tensor, config: AdapterConfig, gradient: Tensor | None) -> Params:
        return {name: torch.full((1,), float(config.init_seed))}

    def keep(layer: Layer, constants: Params) -> None:
        register(layer, constants)
        seed = constants[name]
        for buffer, tensor in derive(0 if seed.is_meta else seed_in(constants, name), layer).items():
            layer.register_buffer(buffer, tensor.to(layer.weight.device), persistent=False)

    return Constants((name,), make, keep)


def seed_in(params: Params, name: str) -> int:
    """The seed among the tensors of a file. Raises UserError unless it is one."""
    seed = float(params[name])
    if not (seed.is_integer() and 0 <= seed < SEEDS):
        raise UserError(
            f"the adapter has a {name} of {seed:g}, and a whole number from 0 to {SEEDS - 1} is due; the file is "
            "damaged: copy it again"
        )
    return int(seed)


@dataclass(frozen=True)
class SeededSum(Sum):
    """A change that draws its own numbers for each row of the weight: the params of some rows also say which."""

    def rows(self, params: Params, start: int, stop: int) -> Params:
        return {**super().rows(params, start, stop), FIRST: torch.full((1,), float(start))}


def rows_of(params: Params, count: int) -> slice:
    """The rows of the weight that params are for, which are `count`."""
    first = int(params[FIRST]) if FIRST in params else 0
    return slice(first, first + count)
