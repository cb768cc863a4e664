"""Which tensors of a merged file are not what base and adapter make of them, by their size or by the change's."""

from collections.abc import Sequence

import torch

from ..files.adapter_file import Adapter
from ..files.base import Base
from ..files.pth import stream_tensors
from ..models.state import split_time_states
from .merge import Merge, MergeOptions, ratio, square

ROUNDED = 1e-2  # relative difference of a tensor that a cast to a file's dtype explains
FAR = 0.5  # of an adapter's change of a tensor
SHOWN = 5


def unexplained(merged: Base, base: Base, adapter: Adapter, name: str) -> list[tuple[str, float]]:
    """[(key, |W' - W| / |W|)] of the tensors W' of a Base `merged` that differ from W, which a Base and an Adapter
    called `name` make, by more than rounding; inf where W has no such tensor. The largest first."""
    merge = Merge(base, [(name, adapter)])
    states = split_time_states(merged.tensors)[1]
    found = [(key, float("inf")) for key in states if key not in merge.specs]
    for key, due in merge.tensors(stream_tensors(base.path)):
        if key not in merged.tensors:
            found.append((key, float("inf")))  # a time state of the adapter
            continue
        expected = due.float()
        difference = ratio(square(merged.tensors[key].float() - expected), square(expected))
        if not difference <= ROUNDED:  # NaN is not
            found.append((key, difference))
    return sorted(found, key=lambda pair: -pair[1])


def far_off(merged: Base, base: Base, adapter: Adapter, name: str) -> list[tuple[str, float]]:
    """[(key, |V - W'| / |W' - W|)] of the tensors V of a Base `merged` that are off W' by more than half of the change
    that an Adapter called `name` makes to a Base's W, the largest first; what W' rounds to in V's dtype is not off it.
    An adapter that was trained on a quantized base may as well be merged into the original."""
    found = _far_off(merged, base, adapter, name, None)
    if found and adapter.metadata.quant != "none":
        found = _far_off(merged, base, adapter, name, "none")
    return sorted(found, key=lambda pair: -pair[1])


def _far_off(merged: Base, base: Base, adapter: Adapter, name: str, quant: str | None) -> list[tuple[str, float]]:
    merge = Merge(base, [(name, adapter)], MergeOptions(dtype=torch.float32, quant=quant))
    found = []
    for key, due in merge.tensors(stream_tensors(base.path)):
        if key not in merge.changes or key not in merged.tensors:
            continue
        tensor = merged.tensors[key]
        if torch.equal(tensor, due.to(tensor.dtype)):
            continue
        change = due - base.tensors[key].float() if key in base.tensors else due
        share = ratio(square(tensor.float() - due), square(change))
        if not share <= FAR:  # NaN is not
            found.append((key, share))
    return found


def describe(found: Sequence[tuple[str, float]]) -> str:
    """The result of `unexplained` in a few words."""
    shown = ", ".join(f"{key} ({difference:.1g})" for key, difference in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{shown}{more}"
