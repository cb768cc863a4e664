"""The ranks at which methods train about as many parameters as the first of them."""

import math
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from ...adapters.method import Method
from ...cli.errors import UserError
from ...config import AdapterConfig, ModelConfig
from ...models.family import Family
from ...models.state import time_state_shapes

Layers = Counter[tuple[int, int]]  # {(out_features, in_features): number of layers}


class Size(NamedTuple):
    """A method's rank, or what it has instead of one (0: none, for the whole model or its states), its mini_rank (0:
    none), the parameters that it trains with them, and those that --train_parts trains beside it."""

    rank: int
    mini_rank: int
    parameters: int
    beside: int = 0

    @property
    def trained(self) -> int:
        """All parameters that train."""
        return self.parameters + self.beside


def parameter_count(method: Method, rank: int, mini_rank: int, layers: Layers) -> int:
    """The number of parameters that a method trains on layers that the rank fits."""
    return sum(
        number * sum(math.prod(shapes[name]) for name in method.parameters)
        for layer, number in layers.items()
        for shapes in (method.tensors.shapes(sized(method, rank, mini_rank), *layer),)
    )


def parts_count(parts: Collection[str], family: Family, model: ModelConfig) -> int:
    """The number of parameters that --train_parts trains in a model of these dimensions."""
    shapes = family.shapes(model) | time_state_shapes(model)
    return sum(math.prod(shape) for key, shape in shapes.items() if family.part_of(key) in parts)


def matched_size(method: Method, wanted: int, layers: Layers) -> Size:
    """The Size whose number of parameters is nearest to `wanted`. Among equally near ones it is the one whose rank and
    mini_rank are nearest to each other, for methods without a mini_rank the lowest rank. Raises UserError if no rank
    fits."""
    outs = math.gcd(*(out_features for out_features, _ in layers))
    minis = [width for width in range(1, outs + 1) if outs % width == 0] if "mini_rank" in method.tensors.size else [0]
    found = [
        Size(rank, mini, parameter_count(method, rank, mini, layers))
        for rank in range(1, max(max(layer) for layer in layers) + 1)
        for mini in minis
        if fits(method, rank, mini, layers)
    ]
    if not found:
        raise UserError(f"no rank of {method.name} fits every layer of this model; leave it out of --methods")
    return min(found, key=lambda size: (abs(size.parameters - wanted), abs(size.rank - size.mini_rank)))


def fits(method: Method, rank: int, mini_rank: int, layers: Iterable[tuple[int, int]]) -> bool:
    return all(method.tensors.fit(sized(method, rank, mini_rank), *layer) is None for layer in layers)


def sized(method: Method, rank: int, mini_rank: int) -> AdapterConfig:
    """The AdapterConfig of a method's size: its first setting is `rank`, whatever it is called."""
    sizes: dict[str, Any] = dict(zip(method.tensors.size, (rank, mini_rank)))
    return AdapterConfig(**sizes)
