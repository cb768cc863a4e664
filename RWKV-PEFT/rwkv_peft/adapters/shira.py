"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): a few entries of the weight train, and the rest stays. Its change has
any rank, and it has no rank to choose.

W'[o, c] = W[o, c] + v[o, j] at c = columns[o, j], for the `entries` columns that each row trains, with v =
`shira_values` (out, entries). The paper leaves the choice of entries open; here each row is divided into that many
stretches, and one entry of each is drawn. A file holds the seed of the draw, `shira_seed` (1,).
"""

import functools
import math
from types import MappingProxyType

import torch
from torch import Tensor

from ..config import AdapterConfig
from .change import Params
from .functions.sparse import added, sparse
from .method import Layer, Method, Misfit, Shapes, Tensors
from .product import Frozen
from .seeded import SeededSum, rows_of, seed_in, seeded, uniform


def fit(config: AdapterConfig, out_features: int, in_features: int) -> Misfit | None:
    if config.entries <= in_features:
        return None
    return Misfit("entries", config.entries, f"is more than the {in_features} entries of a row", in_features)


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return {"shira_values": (out_features, config.entries), "shira_seed": (1,)}


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def columns_of(seed: int, out_features: int, in_features: int, entries: int) -> Tensor:
    """The columns that train, of at least so many rows: (n, entries) int32, ascending."""
    bounds = torch.arange(entries + 1, device="cpu") * in_features // entries
    drawn = uniform(seed, 0, out_features, entries) * bounds.diff()
    return (bounds[:-1] + drawn.floor().long()).int()


def buffers(seed: int, layer: Layer) -> Params:
    """The layer's columns."""
    (out_features, in_features), entries = layer.weight.shape, layer.get_parameter("shira_values").shape[1]
    return {"shira_columns": columns_of(seed, out_features, in_features, entries)[:out_features]}


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    return sparse(x, base, params["shira_values"], params["shira_columns"])


def update(params: Params, scale: float, shape: tuple[int, int]) -> Tensor:
    values, rows = params["shira_values"], rows_of(params, shape[0])
    columns = columns_of(seed_in(params, "shira_seed"), rows.stop, shape[1], values.shape[1])[rows]
    return added(values.new_zeros(shape), columns.to(values.device), values)


METHOD = Method(
    name="shira",
    tensors=Tensors(
        ("shira_values",),
        ("entries",),
        shapes,
        lambda params: {"entries": params["shira_values"].shape[1]},
        fit,
        idle=("shira_seed",),
    ),
    change=SeededSum(MappingProxyType({"shira_values": 0}), update=update, negated=("shira_values",)),
    apply=apply,
    held=seeded("shira_seed", buffers),
    step=lambda method, config, in_features: math.sqrt(config.entries / in_features),  # so many entries of a row move
    pace=3.0,
)
