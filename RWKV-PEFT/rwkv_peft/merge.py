"""Merging adapters into a base model, a band of rows at a time.

Each changed weight is computed in float32 from the base's memory-mapped tensor and cast once; the rest passes
through. A `Merge` knows what changes what; merge_bone.py is the command around it.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch

from .ahead import ahead
from .checkpoint import fingerprint
from .errors import UserError
from .merge_change import LayerChange, WholeChange, check_params
from .pth import all_finite, stream_state
from .pth_writer import TensorSpec

BAND = 1 << 20  # elements computed at a time: enough for calls to cost little, few enough for caches to help


@dataclass(frozen=True)
class MergeOptions:
    """scale multiplies every change; dtype is the output's (None: each tensor keeps the base's); quant
    overrides the quantization of the frozen weights that an adapter names (None: as it names); unmerge
    takes the adapters off again, last first; device is where the arithmetic runs."""

    scale: float = 1.0
    dtype: torch.dtype | None = None
    quant: str | None = None
    unmerge: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class TensorReport:
    """What merging did to one tensor.

    change is |W' - W| / |W| (Frobenius norms; inf where W is zero or new), lost |cast(W') - W'| / |W' - W|: how
    much of the change the cast to the file's dtype took away.
    """

    key: str
    change: float
    lost: float


class Band(NamedTuple):
    """Rows of an output tensor, and the sums of squares of W, W' - W and cast(W') - W' in them (zeros where nothing
    changes)."""

    key: str
    rows: torch.Tensor
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Merge:
    """Adapters bound to a base: which tensors the output has, and how each comes about.

    shapes maps the base's keys to anything with shape and dtype; adapters are (name, Adapter) pairs in
    the order of their application. Raises UserError where an adapter tensor has no place in the base, has the wrong
    shape or changes nothing.
    """

    def __init__(self, shapes, adapters, options=MergeOptions()):
        self.options = options
        self.specs = {key: TensorSpec.of(tensor, options.dtype) for key, tensor in shapes.items()}
        self.changes = {}  # key -> [LayerChange or WholeChange], in the order of their application
        for name, adapter in adapters:
            self._bind(name, adapter, shapes)

    def _bind(self, name, adapter, shapes):
        _check_places(name, adapter, shapes)
        metadata, options = adapter.metadata, self.options
        quant = metadata.quant if options.quant is None else options.quant
        whole = adapter.whole()
        if options.unmerge and whole:
            raise UserError(f"--unmerge cannot restore {len(whole)} tensors that {name} replaced whole (such as "
                            f"{next(iter(whole))}): the base's values are in none of the files")
        if options.unmerge and quant != "none":
            raise UserError(f"--unmerge cannot undo the {quant} quantization that {name} was merged with")
        for key, tensor in whole.items():
            due = expected_whole_shape(key, shapes)
            if tuple(tensor.shape) != due:
                raise UserError(f"{name}: {key} has shape {tuple(tensor.shape)}, and the base's is {due}; it was "
                                "trained on another model")
            if key not in self.specs:  # a time state, new to the base
                self.specs[key] = TensorSpec(due, options.dtype or shapes["emb.weight"].dtype)
            self.changes.setdefault(key, []).append(WholeChange(tensor.to(options.device), options.scale))
        for module, params in adapter.modules().items():
            key = f"{module}.weight"
            check_params(f"{name}: {module}", metadata.variant, params, tuple(shapes[key].shape))
            params = {parameter: tensor.to(options.device) for parameter, tensor in params.items()}
            changes = self.changes.setdefault(key, [])
            dtype = torch.float32 if changes else shapes[key].dtype  # between adapters nothing is rounded
            change = LayerChange(metadata.variant, params, metadata.scale, quant, options.scale, dtype)
            if options.unmerge:
                changes.insert(0, change.removal())
            else:
                changes.append(change)

    def bands(self, pairs, reports=None):
        """Yield the output's (key, rows) from the base's (key, tensor) pairs: each tensor in its turn, as one or more
        runs of its rows, in its dtype, on the CPU; tensors that are new come last.

        A TensorReport of each changed tensor is appended to the list `reports`. Raises UserError for a result that
        is not finite.
        """
        for key, bands in groupby(ahead(self._tasks(pairs)), lambda band: band.key):
            totals = [0.0, 0.0, 0.0]
            for band in bands:
                totals = [total + square for total, square in zip(totals, band.squares)]
                yield key, band.rows
            if reports is not None and key in self.changes:
                size, change, lost = totals
                reports.append(TensorReport(key, ratio(change, size), ratio(lost, change)))

    def tensors(self, pairs, reports=None):
        """Yield the output's (key, tensor), as `bands` with each tensor in one piece; one that does not change is the
        base's own."""
        for key, bands in groupby(self.bands(pairs, reports), lambda band: band[0]):
            rows = [rows for _, rows in bands]
            yield key, torch.cat(rows) if len(rows) > 1 else rows[0]

    def _tasks(self, pairs):
        """A callable -> Band for each band of each tensor of the output."""
        seen = set()
        for key, tensor in pairs:
            seen.add(key)
            yield from self._tasks_of(key, tensor)
        for key, spec in self.specs.items():
            if key not in seen:
                yield from self._tasks_of(key, torch.zeros(spec.shape))

    def _tasks_of(self, key, tensor):
        changes, row = self.changes.get(key, ()), math.prod(tensor.shape[1:])
        unit = math.lcm(*(change.unit(row) for change in changes))
        step = max(BAND // (row * unit), 1) * unit
        if not changes and tensor.dtype == self.specs[key].dtype:
            step = len(tensor)  # passes as it is: nothing is computed, and `tensors` need not copy it
        for start in range(0, len(tensor), step):
            stop = min(start + step, len(tensor))
            yield partial(self._band, key, tensor[start:stop], [change.rows(start, stop) for change in changes])

    @torch.no_grad()
    def _band(self, key, source, changes):
        dtype, squares = self.specs[key].dtype, (0.0, 0.0, 0.0)
        if changes:
            exact = weight = source.to(self.options.device, torch.float32)
            for change in changes:
                exact = change.apply(exact)
            rows = exact.to(dtype)
            squares = square(weight), square(exact - weight), square(rows - exact)
            rows = rows.cpu()
        else:
            rows = source.to(dtype)
        # the last sum is NaN or Inf where an element of rows is, so that most bands need no look of their own
        if not (changes and math.isfinite(squares[-1])) and not all_finite(rows):
            cause = ("in the base already" if not all_finite(source) else
                     f"after the merge, though not in the base: the change is too large for {dtype_name(dtype)}")
            raise UserError(f"{key} holds NaN or Inf, {cause}; nothing is written")
        return Band(key, rows, squares)


def square(tensor):
    """The sum of squares of a float32 tensor."""
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat).item()


def ratio(part, whole):
    """sqrt(part / whole) of two sums of squares; 0 where the part is 0, inf where only the whole is."""
    if part == 0:
        return 0.0
    return math.sqrt(part / whole) if whole else math.inf


def merge_state_dict(base, adapters, options=MergeOptions(), reports=None):
    """A base state dict with adapters merged in: {key: tensor}, the base's keys, order and (unless options.dtype
    says otherwise) dtypes. Arguments and errors as in Merge."""
    return dict(Merge(base, adapters, options).tensors(base.items(), reports))


def check_fingerprints(path, base, adapters):
    """Raise UserError unless each of the (name, Adapter) pairs was trained on the base (tensors of the file at path),
    or on the base with the adapters before it merged. An adapter that names no base passes."""
    own = fingerprint(base)
    for position, (name, adapter) in enumerate(adapters):
        wanted, before = adapter.metadata.base_fingerprint, adapters[:position]
        if not wanted or wanted == own:
            continue
        if before and wanted == fingerprint(Merge(base, before).tensors(stream_state(path))):
            continue
        raise UserError(f"{name} was trained on another base: it names the fingerprint {wanted}, and {path} has {own}; "
                        "find the base it was trained on, or force it with --any_base")


def expected_whole_shape(key, shapes):
    """The shape that a whole tensor must have; time states, which a base need not hold, follow from time_faaaa."""
    if key in shapes:
        return tuple(shapes[key].shape)
    heads, size = shapes[key.replace("time_state", "time_faaaa")].shape
    return heads, size, size


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def _check_places(name, adapter, shapes):
    keys = [f"{module}.weight" for module in adapter.modules()] + list(adapter.whole())
    lost = [key for key in keys if key not in shapes and not (
        key.endswith(".att.time_state") and key.replace("time_state", "time_faaaa") in shapes)]
    if lost:
        raise UserError(f"{name}: {len(lost)} of its {len(keys)} tensors have no place in the base: there is no "
                        f"{lost[0]}, where the base has keys such as {list(shapes)[1]}; it was trained on a model of "
                        "other names or of more layers")
    effective = (tensor for key, tensor in adapter.tensors.items() if not key.endswith("lora_A"))
    if not any(torch.count_nonzero(tensor) for tensor in effective):
        raise UserError(f"{name} changes nothing: its tensors are all zero, as in an adapter that was never trained")
