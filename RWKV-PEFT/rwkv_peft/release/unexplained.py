"""Which tensors of a merged file are not what base and adapter make of them."""

from collections.abc import Sequence

from ..files.adapter_file import Adapter
from ..files.base import Base
from ..files.pth import stream_tensors
from ..models.state import split_time_states
from .merge import Merge, ratio, square

ROUNDED = 1e-2  # relative difference of a tensor that a cast to a file's dtype explains
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


def describe(found: Sequence[tuple[str, float]]) -> str:
    """The result of `unexplained` in a few words."""
    shown = ", ".join(f"{key} ({difference:.1g})" for key, difference in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{shown}{more}"
