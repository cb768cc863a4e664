"""Compare a merged file, tensor by tensor, with what base and adapter make by a computation that is not the merge's.

Tensors that the adapter leaves alone must have the base's values, cast to the file's dtype, and tensors that it trained
whole must have the adapter's. An adapted weight must be as the method is defined (definitions.py), rounded once. Only a
band of rows is in memory at a time.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..adapters.quant import roundtrip, row_unit
from ..checkpoints.adapter_file import Adapter, AdapterMetadata
from ..checkpoints.base import Base
from ..checkpoints.tensors import dtype_name
from ..models.state import is_time_state
from .definitions import DEFINITIONS, Params, less_first_factors

BAND = 1 << 18  # values compared at a time
SLACK = 2.0**-18  # relative to a row's largest value: more than float32 arithmetic loses in computing the row

Range = tuple[torch.Tensor, torch.Tensor]  # the lowest and the highest value allowed for each element
# (rows of the source, their numbers, the file's dtype) -> the Range of the rows
Expect = Callable[[torch.Tensor, torch.Tensor, torch.dtype], Range]


def differences(merged: Base, base: Base, adapter: Adapter) -> list[str]:
    """List in lines how a Base `merged` differs from what a Base and an Adapter make: order of keys, dtypes, values.

    An adapter that was trained on a quantized base may be merged into the quantized or the original one; the closer of
    the two counts.
    """
    odd = list(odd_values(merged, base, adapter, adapter.metadata.quant))
    if odd and adapter.metadata.quant != "none":
        odd = min(odd, list(odd_values(merged, base, adapter, "none")), key=len)
    return [*odd_order(merged, base), *odd_dtypes(merged, base), *odd]


def odd_order(merged: Base, base: Base) -> Iterator[str]:
    """Yield a line about the first key that is not at the base's place, if any; time states may lie anywhere."""
    own, due = ([key for key in model.tensors if not is_time_state(key)] for model in (merged, base))
    if place := next((pair for pair in zip(own, due) if pair[0] != pair[1]), None):
        yield f"the order of the keys: {place[0]} is in the place of the base's {place[1]}"


def odd_dtypes(merged: Base, base: Base) -> Iterator[str]:
    """Yield a line for each tensor whose dtype is not the base's, unless all tensors share one (--output_dtype)."""
    weights = {key: tensor.dtype for key, tensor in merged.tensors.items() if not is_time_state(key)}
    if len(set(weights.values())) > 1:
        for key, dtype in weights.items():
            if dtype != base.tensors[key].dtype:
                yield f"{key}: {dtype_name(dtype)}, and the base has {dtype_name(base.tensors[key].dtype)}"


def odd_values(merged: Base, base: Base, adapter: Adapter, quant: str) -> Iterator[str]:
    """Yield a line for each tensor with wrong values. `quant` names the quantization of the frozen weights."""
    modules = adapter.modules()
    for key, source in (base.tensors | adapter.whole()).items():
        if (tensor := merged.tensors.get(key)) is None:
            yield f"{key}: missing"  # a time state, because a model that lacks another tensor is not opened
            continue
        if params := modules.get(key.removesuffix(".weight")):
            unit = row_unit(quant, tensor.shape[1])
            difference = compared(tensor, source, adapted(adapter.metadata, params, quant), unit)
        else:
            difference = compared(tensor, source, cast)
        if difference.odd:
            unmerged = key in base.tensors and not compared(tensor, base.tensors[key], cast).odd
            yield f"{key}: {difference}" + (", as the base has it" if unmerged else "")


class Difference(NamedTuple):
    """The number of wrong values (odd) among all, the largest deviation, and the indices of the first wrong one."""

    odd: int
    total: int
    largest: float
    first: list[int]

    def __str__(self) -> str:
        return f"{self.odd:,} of {self.total:,} values, by up to {self.largest:.2g}, the first at {self.first}"


def compared(tensor: torch.Tensor, source: torch.Tensor, expect: Expect, unit: int = 1) -> Difference:
    """Compare a tensor with the Range that `expect` computes from `source`, a band at a time -> Difference. Bands begin
    at multiples of `unit`."""
    count, far = 0, [torch.zeros((), dtype=torch.float64)]
    first: list[int] = []
    step = max(BAND // (math.prod(tensor.shape[1:]) * unit), 1) * unit
    for start in range(0, len(tensor), step):
        found = tensor[start : start + step]
        low, high = expect(source[start : start + step], torch.arange(start, start + len(found)), tensor.dtype)
        odd = ~((found >= low) & (found <= high))  # True for NaN
        if odd.any():
            row, *place = odd.nonzero()[0].tolist()
            first = first or [start + row, *place]
            low, high, found = (values[odd].double() for values in (low, high, found))
            count += len(found)
            far.append(torch.maximum(low - found, found - high).max())
    return Difference(count, tensor.numel(), float(torch.stack(far).max()), first)


def cast(source: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> Range:
    """Expect the source's own values, in the file's dtype."""
    values = source.to(dtype)
    return values, values


def adapted(metadata: AdapterMetadata, params: Params, quant: str) -> Expect:
    """Return the Expect of an adapted weight: the definition's value, give or take what float32 may lose, rounded."""
    define, exact = DEFINITIONS[metadata.variant], {name: tensor.double() for name, tensor in params.items()}

    def expect(source: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> Range:
        bases = trained_on(source, rows, exact, metadata, quant)
        ends = [define(base, rows, exact, metadata.scale) for base in bases]
        loss = lost(source.double(), *ends)
        return (ends[0] - loss).to(dtype), (ends[-1] + loss).to(dtype)

    return expect


def trained_on(
    source: torch.Tensor, rows: torch.Tensor, params: Params, metadata: AdapterMetadata, quant: str
) -> list[torch.Tensor]:
    """Compute the weight that the adapter was trained on, from rows of the base, in float64 -> [it]. If it was rounded
    after first factors were taken out of it -> [the lowest, the highest] that it may be."""
    method = metadata.method
    residual = method is not None and method.residual is not None
    if quant == "none" and not residual:
        return [source.double()]
    dtype = metadata.base_dtype() or source.dtype
    kept = [source.to(dtype).double()]
    if residual:
        left = less_first_factors(kept[0], rows, params, metadata.scale)
        loss = lost(kept[0], left)
        kept = [(left - loss).to(dtype).double(), (left + loss).to(dtype).double()]
    if quant == "none":
        return kept
    kept = [roundtrip(weight.float(), quant).double() for weight in kept]
    return [kept[0].minimum(kept[-1]), kept[0].maximum(kept[-1])]


def lost(*values: torch.Tensor) -> torch.Tensor:
    """The most that float32 may lose in each row (n, 1) of values (n, in) that go into or come out of a computation."""
    largest = [torch.linalg.vector_norm(value, torch.inf, 1, keepdim=True) for value in values]
    return SLACK * torch.cat(largest, 1).amax(1, keepdim=True)
