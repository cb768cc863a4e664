"""Merge adapters into a base model; merge_command.py is the command.

The way of a weight: a band of its rows, mapped from the base's file, becomes float32; each adapter's change is applied;
one cast gives the output's dtype, and the rows go into the file. Tensors that no adapter changes are copied.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import torch

from ..adapters.change import Params
from ..adapters.method import Method
from ..adapters.quant import row_unit
from ..checkpoints.adapter_file import Adapter
from ..checkpoints.base import Base
from ..checkpoints.tensors import TensorSpec, dtype_name
from ..cli.errors import UserError
from ..cli.names import all_finite
from .changes import TensorChange, ratio, square
from .compatibility import Adapters, check_fit, check_generations, check_states

Pairs = Iterable[tuple[str, torch.Tensor]]
BAND = 1 << 18  # elements computed at a time: enough that calls cost little, few enough to stay in caches


@dataclass(frozen=True)
class MergeOptions:
    """The options of a merge.

    dtype is the output's (None: each tensor keeps the base's); quant overrides the adapter's record of the
    quantization of the frozen weights (None: as recorded); device does the arithmetic.
    """

    dtype: torch.dtype | None = None
    quant: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class LayerChange:
    """The change of one weight by an adapted layer.

    params are its tensors as the Method takes them; scale is LoRA's; quant names the quantization of the frozen
    weight in training; dtype is the base's in training, before it was quantized or a residual base was made of it;
    amount multiplies the whole change.
    """

    method: Method
    params: Params
    scale: float = 1.0
    quant: str = "none"
    amount: float = 1.0
    dtype: torch.dtype = torch.float32

    def unit(self, columns: int) -> int:
        """The multiple of rows at which bands of a weight with so many columns begin and end."""
        return math.lcm(self.method.change.row_unit(self.params), row_unit(self.quant, columns))

    def rows(self, start: int, stop: int) -> "LayerChange":
        """The same change for rows start to stop of the weight."""
        return replace(self, params=self.method.change.rows(self.params, start, stop))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Change weight (out, in) float32 -> float32, the weight that the trained layer computed with (at amount 1)."""
        base = weight.to(self.dtype) if self.method.residual is not None or self.quant != "none" else weight
        result = self.method.merged(base, self.params, scale=self.scale, quant=self.quant)
        return result if self.amount == 1 else torch.lerp(weight, result, self.amount)


@dataclass(frozen=True)
class WholeChange:
    """The change by a tensor that was trained in full and replaces the base's; amount as in LayerChange."""

    tensor: torch.Tensor
    amount: float = 1.0

    def unit(self, columns: int) -> int:
        return 1

    def rows(self, start: int, stop: int) -> "WholeChange":
        return replace(self, tensor=self.tensor[start:stop])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        new = self.tensor.float()
        return new if self.amount == 1 else torch.lerp(weight, new, self.amount)


def is_layer_change(change: LayerChange | WholeChange) -> bool:
    return isinstance(change, LayerChange)


def changed(weight: torch.Tensor, changes: Sequence[LayerChange | WholeChange]) -> torch.Tensor:
    """A weight (out, in) float32 under changes, each of the result of those before: float32, not rounded."""
    return reduce(lambda weight, change: change.apply(weight), changes, weight)


class Band(NamedTuple):
    """Rows of an output tensor, with the sums of squares of W, W' - W and cast(W') - W' over them (zeros if nothing
    changes); differs is True if any element differs from the base's."""

    key: str
    rows: torch.Tensor
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    differs: bool = False


class Merge:
    """Adapters bound to a base: the specs of the output's tensors, and the changes that make them, by key.

    adapters are (name, Adapter) pairs in the order of their application, each to the result of those before. Raises
    UserError for an adapter of another generation, one that does not fit the base or changes nothing, time states in
    some layers only, and options that contradict an adapter.
    """

    def __init__(self, base: Base, adapters: Adapters, options: MergeOptions | None = None) -> None:
        self.options = options or MergeOptions()
        self.specs = {key: TensorSpec.of(tensor, self.options.dtype) for key, tensor in base.tensors.items()}
        self.changes: dict[str, list[LayerChange | WholeChange]] = {}
        check_generations(base, adapters)
        for name, adapter in adapters:
            check_fit(name, adapter, base)
            check_options(name, adapter, self.options)
            self._add(adapter, base)
        check_states([name for name, _ in adapters], self.specs, base.config)
        self.added = list(self.specs)[len(base.tensors) :]  # keys of time states, which are new to the base

    def _add(self, adapter: Adapter, base: Base) -> None:
        metadata, options = adapter.metadata, self.options
        for key, tensor in adapter.whole().items():
            if key not in self.specs:
                self.specs[key] = TensorSpec.of(tensor, options.dtype or base.tensors["emb.weight"].dtype)
            self.changes.setdefault(key, []).append(WholeChange(tensor.to(options.device), adapter.amount))
        for module, params in adapter.modules().items():
            key = f"{module}.weight"
            assert metadata.method is not None  # the readers refuse tensors of no method
            params = {name: tensor.to(options.device) for name, tensor in params.items()}
            changes, quant = self.changes.setdefault(key, []), options.quant or metadata.quant
            # a file that names no precision was trained in the base's own dtype; after an adapter nothing is rounded
            dtype = metadata.base_dtype() or (torch.float32 if changes else base.tensors[key].dtype)
            changes.append(LayerChange(metadata.method, params, metadata.scale, quant, adapter.amount, dtype))

    def bands(
        self, pairs: Pairs, report: Callable[[TensorChange], None] = lambda change: None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the output's (key, rows) from the base's (key, tensor) pairs: tensor by tensor, each as one or more
        runs of its rows, in its dtype, on the CPU; new tensors come last.

        `report` gets the TensorChange of each changed tensor after its last rows. Raises UserError if a result is not
        finite, and after the last tensor if the output equals the base.
        """
        changes = []
        for key, bands in groupby(prefetch(self._tasks(pairs)), lambda band: band.key):
            totals, differs = [0.0, 0.0, 0.0], False
            for band in bands:
                totals = [total + square for total, square in zip(totals, band.squares)]
                differs = differs or band.differs
                yield key, band.rows
            if key in self.changes:
                size, change, lost = totals
                changes.append(TensorChange(key, ratio(change, size), ratio(lost, change), differs))
                report(changes[-1])
        if changes and not any(change.differs for change in changes):
            raise self._equal_to_base(changes)

    def whole(self, base: Base) -> dict[str, torch.Tensor]:
        """{key: tensor} of those that adapters only put in the Base's places, its states among them: float32, not
        rounded."""
        kept = {key: changes for key, changes in self.changes.items() if not any(map(is_layer_change, changes))}
        weights = {key: base.tensors.get(key, torch.zeros(self.specs[key].shape)).float() for key in kept}
        return {key: changed(weights[key], kept[key]) for key in kept}

    def tensors(self, pairs: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the output's (key, tensor), as `bands` does but whole; an unchanged one is the base's own, no copy."""
        for key, bands in groupby(self.bands(pairs), lambda band: band[0]):
            rows = [rows for _, rows in bands]
            yield key, torch.cat(rows) if len(rows) > 1 else rows[0]

    def _tasks(self, pairs: Pairs) -> Iterator[Callable[[], Band]]:
        """Yield a callable that computes the Band, for each band of each output tensor."""
        new = ((key, torch.zeros(self.specs[key].shape)) for key in self.added)
        for key, tensor in chain(pairs, new):
            changes, columns = self.changes.get(key, ()), math.prod(tensor.shape[1:])
            unit = math.lcm(*(change.unit(columns) for change in changes))
            step = max(BAND // (columns * unit), 1) * unit
            if not changes and tensor.dtype == self.specs[key].dtype:
                step = len(tensor)  # unchanged: one band, so that `tensors` need not copy it
            for start in range(0, len(tensor), step):
                stop = min(start + step, len(tensor))
                yield partial(self._band, key, tensor[start:stop], [change.rows(start, stop) for change in changes])

    @torch.no_grad()
    def _band(self, key: str, source: torch.Tensor, changes: Sequence[LayerChange | WholeChange]) -> Band:
        dtype = self.specs[key].dtype
        if not changes:
            rows = source.to(dtype)
            check_finite(key, rows, source)
            return Band(key, rows)
        weight = source.to(self.options.device, torch.float32)
        exact = changed(weight, changes)
        rows = exact.to(dtype)  # the only cast
        squares = square(weight), square(exact - weight), square(rows - exact)
        rows = rows.cpu()
        if not math.isfinite(squares[-1]):  # as it is if an element of rows is NaN or Inf
            check_finite(key, rows, source)
        return Band(key, rows, squares, differs=not torch.equal(rows, source.to(dtype)))

    def _equal_to_base(self, changes: Sequence[TensorChange]) -> UserError:
        largest = max(changes, key=lambda change: change.change)
        if largest.change == 0:
            return UserError(
                "the merge changes no weight: the adapters' change is zero, or too small for float32 (an alpha of 0, a "
                "training that barely moved?); nothing is written"
            )
        return UserError(
            f"the merge would equal the base: the largest change, {100 * largest.change:.2g} % of {largest.key}, "
            f"is lost in the cast to {dtype_name(self.specs[largest.key].dtype)}; --output_dtype fp32 keeps it; "
            "nothing is written"
        )


def prefetch(tasks: Iterable[Callable[[], Band]]) -> Iterator[Band]:
    """Yield task() for each task, in order, while the next ones run in as many threads as torch has.

    Each thread computes with one of torch's. At most three tasks a thread are running or wait to be taken, so memory
    stays bounded. The caller's thread advances the iterable; a task's error is raised in its turn.
    """
    threads = torch.get_num_threads()
    waiting: deque[Future[Band]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 3 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' calls changed the default of threads started later


def check_finite(key: str, rows: torch.Tensor, source: torch.Tensor) -> None:
    """Raise UserError, with the cause, if output rows made of the base's rows `source` hold NaN or Inf."""
    if all_finite(rows):
        return
    dtype = dtype_name(rows.dtype)
    if not all_finite(source):
        cause = "in the base already"
    elif not all_finite(source.to(rows.dtype)):
        cause = f"because the base's own values are too large for {dtype}; give --output_dtype bf16 or fp32"
    else:
        cause = f"after the merge, though not in the base: the change is too large for {dtype}"
    raise UserError(f"{key} holds NaN or Inf, {cause}; nothing is written")


def check_options(name: str | Path, adapter: Adapter, options: MergeOptions) -> None:
    """Raise UserError if the options contradict an adapter."""
    recorded = adapter.metadata.quant
    quant = options.quant or recorded
    if recorded != "none" and quant not in ("none", recorded):
        raise UserError(
            f"--quant {quant} contradicts {name}, which was trained on a base quantized to {recorded}; leave --quant "
            "out to merge onto that, or give --quant none for the original base"
        )


def merged_tensors(base: Base, adapters: Adapters, options: MergeOptions | None = None) -> dict[str, torch.Tensor]:
    """Merge adapters into a Base -> {key: tensor} in the base's keys, order and (unless options.dtype is given) dtypes;
    new time states come last. Arguments as in Merge, errors as in Merge and its `bands`."""
    return dict(Merge(base, adapters, options).tensors(base.tensors.items()))


def check_fingerprints(base: Base, adapters: Adapters) -> None:
    """Raise UserError unless each adapter was trained on the Base. One that names no base passes. The
    generations are checked first, because no flag forces those."""
    check_generations(base, adapters)
    for position, (name, adapter) in enumerate(adapters):
        first = "merge the adapters before it first and give the result as the base" if position else ""
        remedy = f"{first or 'find the base it was trained on'}, or force it with --any_base"
        adapter.metadata.require_base(name, base, remedy)
