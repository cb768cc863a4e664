"""Merge adapters into a base model, a band of rows at a time.

Each changed weight is computed in float32 from the base's memory-mapped tensor and cast once; other tensors pass
through. A `Merge` holds the changes of each tensor; merge_bone.py is the command around it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from ..adapters.quant import roundtrip
from ..checkpoints.adapter_file import Adapter
from ..checkpoints.base import Base, fingerprint_of, sample
from ..checkpoints.tensors import DTYPES, TensorSpec, dtype_name, stream_tensors
from ..cli.errors import UserError
from ..cli.numeric import all_finite
from .ahead import ahead
from .belonging import Adapters, check_depth, check_effect, check_generations, check_places, check_states
from .changes import LayerChange, WholeChange, check_params

Pairs = Iterable[tuple[str, torch.Tensor]]
BAND = 1 << 18  # elements computed at a time: enough that calls cost little, few enough to stay in caches


@dataclass(frozen=True)
class MergeOptions:
    """The options of a merge.

    scale multiplies every change; dtype is the output's (None: each tensor keeps the base's); quant overrides the
    adapter's record of how the frozen weights were quantized (None: as recorded); unmerge takes the adapters off
    again, last first; device is that of the arithmetic.
    """

    scale: float = 1.0
    dtype: torch.dtype | None = None
    quant: str | None = None
    unmerge: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class TensorReport:
    """The change of one tensor by a merge.

    change is |W' - W| / |W| (Frobenius norms; inf if W is zero or new). lost is |cast(W') - W'| / |W' - W|, the share
    of the change that the cast to the file's dtype took away. differs is True if any element of cast(W') differs from
    cast(W).
    """

    key: str
    change: float
    lost: float
    differs: bool


class Band(NamedTuple):
    """Rows of an output tensor, with the sums of squares of W, W' - W and cast(W') - W' over them (zeros if nothing
    changes); differs is True if any element differs from the base's."""

    key: str
    rows: torch.Tensor
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    differs: bool = False


class Merge:
    """Adapters bound to a base: the specs of the output's tensors and the changes that make them.

    base is a Base; adapters are (name, Adapter) pairs in the order of their application. Raises UserError if an
    adapter is of another generation or changes nothing, if one of its tensors has no place in the base or the wrong
    shape, if time states would be in some layers only, or if the options contradict an adapter.
    """

    def __init__(self, base: Base, adapters: Adapters, options: MergeOptions | None = None) -> None:
        self.options = options or MergeOptions()
        self.specs = {key: TensorSpec.of(tensor, self.options.dtype) for key, tensor in base.tensors.items()}
        self.changes: dict[str, list[LayerChange | WholeChange]] = {}  # in the order of their application
        check_generations(base, adapters)
        for name, adapter in adapters:
            self._bind(name, adapter, base)
        check_states([name for name, _ in adapters], self.specs, base.config)

    def _bind(self, name: str | Path, adapter: Adapter, base: Base) -> None:
        shapes = check_places(name, adapter, base)
        check_effect(name, adapter)
        metadata, options = adapter.metadata, self.options
        quant = metadata.quant if options.quant is None else options.quant
        if metadata.quant != "none" and quant not in ("none", metadata.quant):
            raise UserError(
                f"--quant {quant} contradicts {name}, which was trained on a base quantized to {metadata.quant}; leave "
                "--quant out to merge onto that, or give --quant none for the original base"
            )
        whole = adapter.whole()
        if options.unmerge and whole:
            raise UserError(
                f"--unmerge cannot restore {len(whole)} tensors that {name} replaced whole (such as "
                f"{next(iter(whole))}): the base's values are in none of the files"
            )
        if options.unmerge and quant != "none":
            raise UserError(f"--unmerge cannot undo the {quant} quantization that {name} was merged with")
        for key, tensor in whole.items():
            due = shapes[key]
            if tuple(tensor.shape) != due:
                raise UserError(
                    f"{name}: {key} has shape {tuple(tensor.shape)}, and the base's is {due}; it was "
                    "trained on another model"
                )
            if key not in self.specs:  # a time state, new to the base
                self.specs[key] = TensorSpec(due, options.dtype or base.tensors["emb.weight"].dtype)
            self.changes.setdefault(key, []).append(WholeChange(tensor.to(options.device), options.scale))
        for module, params in adapter.modules().items():
            key = f"{module}.weight"
            assert metadata.method is not None  # the readers refuse tensors of no method
            check_params(f"{name}: {module}", metadata.method, params, shapes[key])
            params = {parameter: tensor.to(options.device) for parameter, tensor in params.items()}
            changes = self.changes.setdefault(key, [])
            # a file that names no precision was trained in the base's own dtype; after an adapter nothing is rounded
            dtype = metadata.base_dtype() or (torch.float32 if changes else base.tensors[key].dtype)
            change = LayerChange(metadata.method, params, metadata.scale, quant, options.scale, dtype)
            if options.unmerge:
                changes.insert(0, change.removal())
            else:
                changes.append(change)

    def bands(
        self, pairs: Pairs, report: Callable[[TensorReport], None] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the output's (key, rows) from the base's (key, tensor) pairs: tensor by tensor, each as one or more
        runs of its rows, in its dtype, on the CPU; new tensors come last.

        `report` is called with the TensorReport of each changed tensor after its last rows were taken. Raises UserError
        if a result is not finite, and after the last tensor if the output equals the base.
        """
        reports = []
        for key, bands in groupby(ahead(self._tasks(pairs)), lambda band: band.key):
            totals, differs = [0.0, 0.0, 0.0], False
            for band in bands:
                totals = [total + square for total, square in zip(totals, band.squares)]
                differs = differs or band.differs
                yield key, band.rows
            if key in self.changes:
                size, change, lost = totals
                reports.append(TensorReport(key, ratio(change, size), ratio(lost, change), differs))
                if report is not None:
                    report(reports[-1])
        if self.changes and not any(report.differs for report in reports):
            self._refuse_the_base(reports)

    def _refuse_the_base(self, reports: Sequence[TensorReport]) -> NoReturn:
        """Raise the UserError for an output that equals the base."""
        largest = max(reports, key=lambda report: report.change)
        if largest.change == 0:
            raise UserError(
                "the merge changes no weight: the adapters' change is zero, or too small for float32 (an alpha of 0, a "
                "training that barely moved?); nothing is written"
            )
        raise UserError(
            f"the merge would equal the base: the largest change, {100 * largest.change:.2g} % of {largest.key}, "
            f"is lost in the cast to {dtype_name(self.specs[largest.key].dtype)}; --output_dtype fp32 keeps it; "
            "nothing is written"
        )

    def tensors(self, pairs: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the output's (key, tensor), as `bands` does but whole; an unchanged one is the base's own, no copy."""
        for key, bands in groupby(self.bands(pairs), lambda band: band[0]):
            rows = [rows for _, rows in bands]
            yield key, torch.cat(rows) if len(rows) > 1 else rows[0]

    def _tasks(self, pairs: Pairs) -> Iterator[Callable[[], Band]]:
        """Yield a callable that computes the Band, for each band of each output tensor."""
        seen = set()
        for key, tensor in pairs:
            seen.add(key)
            yield from self._tasks_of(key, tensor)
        for key, spec in self.specs.items():
            if key not in seen:
                yield from self._tasks_of(key, torch.zeros(spec.shape))

    def _tasks_of(self, key: str, tensor: torch.Tensor) -> Iterator[Callable[[], Band]]:
        changes, row = self.changes.get(key, ()), math.prod(tensor.shape[1:])
        unit = math.lcm(*(change.unit(row) for change in changes))
        step = max(BAND // (row * unit), 1) * unit
        if not changes and tensor.dtype == self.specs[key].dtype:
            step = len(tensor)  # unchanged: one band, so that `tensors` need not copy it
        for start in range(0, len(tensor), step):
            stop = min(start + step, len(tensor))
            yield partial(self._band, key, tensor[start:stop], [change.rows(start, stop) for change in changes])

    @torch.no_grad()
    def _band(self, key: str, source: torch.Tensor, changes: Sequence[LayerChange | WholeChange]) -> Band:
        dtype, squares, differs = self.specs[key].dtype, (0.0, 0.0, 0.0), False
        if changes:
            exact = weight = source.to(self.options.device, torch.float32)
            for change in changes:
                exact = change.apply(exact)
            rows = exact.to(dtype)
            squares = square(weight), square(exact - weight), square(rows - exact)
            rows = rows.cpu()
            differs = not torch.equal(rows, source.to(dtype))  # stops at the first difference
        else:
            rows = source.to(dtype)
        # the last sum is NaN or Inf if an element of rows is, so most bands need no scan of their own
        if not (changes and math.isfinite(squares[-1])) and not all_finite(rows):
            raise UserError(f"{key} holds NaN or Inf, {_cause_of_infinity(source, dtype)}; nothing is written")
        return Band(key, rows, squares, differs)


def _cause_of_infinity(source: torch.Tensor, dtype: torch.dtype) -> str:
    """Say why a tensor made from the base's rows `source` holds NaN or Inf in dtype."""
    if not all_finite(source):
        return "in the base already"
    if not all_finite(source.to(dtype)):
        return f"because the base's own values are too large for {dtype_name(dtype)}; give --output_dtype bf16 or fp32"
    return f"after the merge, though not in the base: the change is too large for {dtype_name(dtype)}"


def quantization_error(base: Base, adapters: Adapters) -> float:
    """Return |Q(W) - W| / |W| over the weights W that the (name, Adapter) pairs' trainings quantized to Q(W)."""
    error = size = 0.0
    for _, adapter in adapters:
        metadata = adapter.metadata
        for module in adapter.modules() if metadata.quant != "none" else ():
            weight = base.tensors[f"{module}.weight"]
            kept = roundtrip(weight.to(metadata.base_dtype() or weight.dtype), metadata.quant)
            error, size = error + square(kept - weight.float()), size + square(weight.float())
    return ratio(error, size)


def square(tensor: torch.Tensor) -> float:
    """The sum of squares of a float32 tensor."""
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat).item()


def ratio(part: float, whole: float) -> float:
    """Return sqrt(part / whole) of two sums of squares; 0 if the part is 0, inf if only the whole is."""
    if part == 0:
        return 0.0
    return math.sqrt(part / whole) if whole else math.inf


def merged_tensors(base: Base, adapters: Adapters, options: MergeOptions | None = None) -> dict[str, torch.Tensor]:
    """Merge adapters into a Base -> {key: tensor} in the base's keys, order and (unless options.dtype says otherwise)
    dtypes; new time states come last. Arguments as in Merge, errors as in Merge and its `bands`."""
    return dict(Merge(base, adapters, options).tensors(base.tensors.items()))


def fingerprints_merged(base: Base, adapters: Adapters) -> set[str]:
    """The fingerprints of a Base with adapters merged in: one for its own dtypes, one for each of DTYPES."""
    own = {key: spec.dtype for key, spec in Merge(base, adapters).specs.items()}
    exact = Merge(base, adapters, MergeOptions(dtype=torch.float32)).tensors(stream_tensors(base.path))
    samples = [(key, tensor.shape, sample(tensor)) for key, tensor in exact]
    return {
        fingerprint_of((key, shape, values.to(dtype or own[key])) for key, shape, values in samples)
        for dtype in (None, *DTYPES.values())
    }


def check_fingerprints(base: Base, adapters: Adapters) -> None:
    """Raise UserError unless each of the (name, Adapter) pairs was trained on the Base, or on it with the adapters
    before it merged, in any dtype that merging writes. An adapter that names no base passes unless check_depth objects.
    The generations are checked first, because no flag forces those."""
    check_generations(base, adapters)
    for position, (name, adapter) in enumerate(adapters):
        check_depth(name, adapter, base)
        wanted, before = adapter.metadata.base_fingerprint, adapters[:position]
        if not before or wanted in ("", base.fingerprint) or wanted not in fingerprints_merged(base, before):
            remedy = "find the base it was trained on, or force it with --any_base"
            adapter.metadata.require_base(name, base, remedy)
