"""How far each tensor of a model moved from its base, as a grid of layers and matrices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..files.adapter_file import Adapter
from ..files.base import Base
from .merge import Merge, TensorReport, check_fingerprints, ratio, square

SHADES = " ░▒▓█"
CHUNK = 1 << 22  # values compared at a time


@dataclass(frozen=True)
class Heat:
    """rows: numbers of the layers; columns: names of tensors in a block ("att.key"); cells: |W' - W| / |W| (Frobenius
    norms) by (layer, column), of those that moved; outside: the same by key, of tensors that stand in no block."""

    rows: Sequence[int]
    columns: Sequence[str]
    cells: Mapping[tuple[int, str], float]
    outside: Mapping[str, float]


def changes_of(base: Base, other: Base | Adapter, name: str) -> dict[str, float]:
    """{key: |W' - W| / |W|} of what a merged model, or an adapter, changes of a Base; states that one of two models
    lacks are zeros there. Raises UserError where the two do not belong together."""
    if isinstance(other, Adapter):
        check_fingerprints(base, [(name, other)])
        reports: list[TensorReport] = []
        for _ in Merge(base, [(name, other)]).bands(base.tensors.items(), reports.append):
            pass  # each band is made for its report alone
        return {report.key: report.change for report in reports}
    if other.config != base.config:
        raise UserError(
            f"{base.path} has other dimensions than {name}, so that it is not its base; name the model that it was "
            "made of"
        )
    either = base.tensors | other.tensors
    zeros = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in either.items()}
    before, after = zeros | base.tensors, zeros | other.tensors
    moved = {key: distance(after[key], before[key]) for key in either}
    return {key: change for key, change in moved.items() if change}


def distance(tensor: torch.Tensor, base: torch.Tensor) -> float:
    """|W' - W| / |W|, a run of values at a time."""
    change = size = 0.0
    for new, old in zip(tensor.reshape(-1).split(CHUNK), base.reshape(-1).split(CHUNK)):
        change += square(new.float() - old.float())
        size += square(old.float())
    return ratio(change, size)


def heat_of(changes: Mapping[str, float]) -> Heat:
    """The Heat of {key: change}."""
    cells, outside = {}, {}
    for key, change in changes.items():
        parts = key.removesuffix(".weight").split(".")
        if parts[0] == "blocks":
            cells[int(parts[1]), ".".join(parts[2:])] = change
        else:
            outside[key] = change
    rows = sorted({layer for layer, _ in cells})
    return Heat(rows, list(dict.fromkeys(name for _, name in sorted(cells))), cells, outside)


def text_of(heat: Heat) -> str:
    """A Heat in percent, each cell with a shade of how much it is of the largest; "" where nothing moved. Of a tensor
    that was zero the change is inf, whose shade is the darkest, and by which no other is measured."""
    values = [*heat.cells.values(), *heat.outside.values()]
    largest = max(filter(math.isfinite, values), default=0.0)
    width = max((len(name) for name in heat.columns), default=0) + 2
    lines = []
    if heat.cells:
        lines.append("layer " + "".join(f"{name:>{width}}" for name in heat.columns))
    for layer in heat.rows:
        cells = [heat.cells.get((layer, name)) for name in heat.columns]
        lines.append(f"{layer:5} " + "".join(f"{cell_text(cell, largest):>{width}}" for cell in cells))
    lines += [f"{key}  {cell_text(change, largest)}" for key, change in heat.outside.items()]
    if any(map(math.isnan, values)):
        lines.append("nan: the tensor or the base's holds NaN or Inf; copy the file again, or take an earlier one")
    return "\n".join(lines)


def cell_text(change: float | None, largest: float) -> str:
    """One cell of the text."""
    if change is None:
        return "-"
    if math.isnan(change):
        return "nan"
    darkest = len(SHADES) - 1
    shade = darkest if change >= largest else min(darkest, int(len(SHADES) * change / largest))
    return f"{100 * change:.3g} {SHADES[shade]}"
