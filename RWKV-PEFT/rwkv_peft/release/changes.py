"""The change of each tensor by a merge or a training: its measures, and their table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..checkpoints.tensors import TensorSpec


class TensorChange(NamedTuple):
    """The change of one tensor W to W'.

    change is |W' - W| / |W| (Frobenius norms; inf if W is zero or new). lost is |cast(W') - W'| / |W' - W|, the share
    of the change that a merge's cast to the file's dtype took away. differs is True if an element of cast(W') differs
    from cast(W).
    """

    key: str
    change: float
    lost: float = 0.0
    differs: bool = True


def square(tensor: torch.Tensor) -> float:
    """The sum of squares of a float32 tensor."""
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat).item()


def ratio(part: float, whole: float) -> float:
    """sqrt(part / whole) of two sums of squares; 0 if the part is 0, inf if only the whole is."""
    if part == 0:
        return 0.0
    return math.sqrt(part / whole) if whole else math.inf


def change_table(changes: Sequence[TensorChange], specs: Mapping[str, TensorSpec]) -> str:
    """The table of changes in percent, at most 80 columns wide: a row for each block, a column for each matrix.

    specs are the whole model's. Other tensors share a column, which has their largest change; tensors outside of
    the blocks share the row "-". A last column has the share that casts lost, if any did.
    """
    linear = (key for key, spec in specs.items() if key.endswith(".weight") and len(spec.shape) == 2)
    matrices = {place(key)[1] for key in linear if key.startswith("blocks.")}
    rows: dict[str, dict[str, TensorChange]] = {}
    for change in changes:
        block, name = place(change.key)
        rows.setdefault(block, {})[name] = change
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = [name for name in names if name in matrices]
    has_others, has_lost = len(columns) < len(names), any(change.lost for change in changes)
    heads = [*map(short, columns), *["others"] * has_others, *["cast lost"] * has_lost]
    widths = [max(7, len(head) + 1) for head in heads]
    lines = ["block" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths))]
    for block, row in rows.items():
        cells = [percent(row[name].change) if name in row else "" for name in columns]
        if has_others:
            cells.append(largest(change.change for name, change in row.items() if name not in columns))
        if has_lost:
            cells.append(largest(change.lost for change in row.values()))
        lines.append(f"{block:>5}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    return "\n".join(lines)


def place(key: str) -> tuple[str, str]:
    """A tensor's block and its name there: "blocks.3.att.key.weight" -> ("3", "att.key"); outside of blocks ("-", key
    without ".weight")."""
    name = key.removesuffix(".weight")
    if not name.startswith("blocks."):
        return "-", name
    _, block, name = name.split(".", 2)
    return block, name


def short(name: str) -> str:
    """The papers' letters for a name: "att.receptance" -> "att.r"."""
    part, _, leaf = name.rpartition(".")
    return f"{part}.{leaf[:1]}" if part else leaf[:6]


def largest(shares: Iterable[float]) -> str:
    """The largest of some shares in percent, NaN before any number; "" of none."""
    values = list(shares)
    return percent(max(values, key=lambda share: (math.isnan(share), share))) if values else ""


def percent(share: float) -> str:
    """A share in percent, in at most six characters."""
    value = 100 * share
    return f"{value:.2g}" if value < 10 or value >= 1e5 else f"{value:.0f}"
