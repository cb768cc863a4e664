"""Show how far each tensor of a model moved from its base, as a grid of layers and matrices: `rwkv-peft inspect FILE`.

rwkv-peft inspect adapter.safetensors --base_model base.pth --output heat.png"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints.adapter_file import Adapter
from ..checkpoints.adapters import source_of
from ..checkpoints.atomic import check_output
from ..checkpoints.base import Base, open_base
from ..cli.errors import UserError
from ..plots import plot_heat
from .contents import contents_of, formatted
from .flags import inspect_flags
from .merge import Merge, TensorReport, check_fingerprints, ratio, square

SHADES = " ░▒▓█"
CHUNK = 1 << 22  # values compared at a time


@dataclass(frozen=True)
class Heat:
    """The grid of changes |W' - W| / |W| (Frobenius norms) of the tensors that moved.

    rows are the numbers of the layers; columns the names of tensors in a block ("att.key"); cells the changes by
    (layer, column); outside the changes by key of tensors that are in no block.
    """

    rows: Sequence[int]
    columns: Sequence[str]
    cells: Mapping[tuple[int, str], float]
    outside: Mapping[str, float]


def changes_of(base: Base, other: Base | Adapter, name: str) -> dict[str, float]:
    """Compute {key: |W' - W| / |W|} for the tensors of a Base that a merged model, or an adapter, called `name`
    changes. Time states that only one of two models holds count as zeros in the other."""
    if isinstance(other, Adapter):
        check_fingerprints(base, [(name, other)])
        reports: list[TensorReport] = []
        for _ in Merge(base, [(name, other)]).bands(base.tensors.items(), reports.append):
            pass  # only the reports are needed
        return {report.key: report.change for report in reports}
    if other.config != base.config:
        raise UserError(
            f"{base.path} has other dimensions than {name}, so that it is not its base; name the model that it was "
            "made from"
        )
    either = base.tensors | other.tensors
    zeros = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in either.items()}
    before, after = zeros | base.tensors, zeros | other.tensors
    moved = {key: distance(after[key], before[key]) for key in either}
    return {key: change for key, change in moved.items() if change}


def distance(tensor: torch.Tensor, base: torch.Tensor) -> float:
    """Compute |W' - W| / |W|, CHUNK values at a time."""
    change = size = 0.0
    for new, old in zip(tensor.reshape(-1).split(CHUNK), base.reshape(-1).split(CHUNK)):
        change += square(new.float() - old.float())
        size += square(old.float())
    return ratio(change, size)


def heat_of(changes: Mapping[str, float]) -> Heat:
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
    """Write a Heat in percent, each cell with a shade relative to the largest change; "" if nothing moved. The change
    of a tensor that was zero is inf: it gets the darkest shade and does not count as the largest."""
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
    """Write one cell: percent and shade; "-" if the tensor did not move."""
    if change is None:
        return "-"
    if math.isnan(change):
        return "nan"
    darkest = len(SHADES) - 1
    shade = darkest if change >= largest else min(darkest, int(len(SHADES) * change / largest))
    return f"{100 * change:.3g} {SHADES[shade]}"


def main(argv: list[str]) -> int:
    args = inspect_flags(argv)
    contents = contents_of(source_of(args, args.file))
    if args.output:
        check_output("--output", Path(args.output), [("the file", args.file), ("--base_model", args.base_model)])
    print(formatted(contents.lines))
    if args.base_model is None:
        return 0
    if contents.holds is None:
        raise UserError(f"{args.file} is neither a model nor an adapter that is read here, which --base_model compares")
    heat = heat_of(changes_of(open_base(args.base_model), contents.holds, args.file))
    print("\nchange of each tensor from the base, |W' - W| / |W| in %:\n" + (text_of(heat) or "none: it is the base"))
    if args.output:
        plot_heat(heat.rows, heat.columns, heat.cells, args.output)
        print(f"wrote {args.output}")
    return 0
