"""Merging adapters into a base model, tensor by tensor.

Each changed weight is computed in float32 from the base's memory-mapped tensor, a band of rows at a time, and
cast once; the rest passes through. A `Merge` knows what changes what; merge_bone.py is the command around it.
"""

import math
from dataclasses import dataclass, replace

import torch

from .adapter_file import AdapterMetadata
from .adapters.delta import RESIDUAL_VARIANTS, delta, merged
from .errors import UserError
from .pth import all_finite
from .pth_writer import TensorSpec

BAND = 1 << 20  # elements computed at a time: temporaries stay small enough for the allocator to reuse


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


@dataclass(frozen=True)
class LayerChange:
    """An adapter on one weight; params are its tensors as adapters.delta takes them."""

    params: dict
    metadata: AdapterMetadata

    @property
    def granularity(self):
        """A band of rows that starts and ends at multiples of this can be computed by itself; 0: none can."""
        if self.metadata.quant != "none":  # quantization blocks may span rows
            return 0
        if self.metadata.variant in ("bat-in", "bat-out", "bone-mini"):
            return self.params["bone"].shape[-1]
        return 1

    def rows(self, start, stop):
        """The same change for rows start to stop of the weight."""
        params, variant = dict(self.params), self.metadata.variant
        if variant == "bat-out":
            rank = params["bone"].shape[-1]
            params["bone"] = params["bone"][start // rank : stop // rank]
        elif variant == "bone":
            params["bone"] = params["bone"][:, start:stop]
        for name in params.keys() & {"lora_B", "init_lora_B"}:
            params[name] = params[name][start:stop]
        return LayerChange(params, self.metadata)

    def apply(self, weight, scale):
        """weight (out, in) in any float dtype -> float32, the weight that the trained layer computed with."""
        result = merged(self.metadata.variant, weight, self._on(weight), scale=self.metadata.scale,
                        quant=self.metadata.quant)
        return result if scale == 1 else torch.lerp(weight.float(), result, scale)

    def undo(self, weight, scale):
        """The weight before `apply`, up to rounding, float32.

        A block affine change W' = W (I + B) + B is undone by the block affine change with
        C = (I + B)^-1 - I in B's place: W = (W' - B)(I + B)^-1 = W' (I + C) + C. The other changes do not depend
        on W and are subtracted.
        """
        variant, params = self.metadata.variant, self._on(weight)
        factor = -scale * self.metadata.scale
        if variant in ("bone", "bone-mini"):
            params["bone"] = -scale * params["bone"].float()
        elif variant in ("bat-in", "bat-out"):
            bone = scale * params["bone"].double()
            identity = torch.eye(bone.shape[-1], dtype=bone.dtype, device=bone.device)
            inverse, singular = torch.linalg.inv_ex(identity + bone)
            if singular.any():
                raise UserError("--unmerge: an I + B of the adapter has no inverse, so that merging lost the base")
            params["bone"] = inverse - identity
        weight = weight.float()
        return weight + delta(variant, weight, params, scale=factor)

    def _on(self, weight):
        return {name: tensor.to(weight.device) for name, tensor in self.params.items()}


@dataclass(frozen=True)
class WholeChange:
    """A tensor trained in full, which takes the base's place."""

    tensor: torch.Tensor
    granularity = 1

    def rows(self, start, stop):
        return WholeChange(self.tensor[start:stop])

    def apply(self, weight, scale):
        new = self.tensor.to(weight.device).float()
        return new if scale == 1 else torch.lerp(weight.float(), new, scale)


class Merge:
    """Adapters bound to a base: which tensors the output has, and how each comes about.

    shapes maps the base's keys to anything with shape and dtype; adapters are (name, Adapter) pairs in
    the order of their application. Raises UserError where an adapter tensor has no place in the base, has the wrong
    shape or changes nothing.
    """

    def __init__(self, shapes, adapters, options=MergeOptions()):
        self.options = options
        self.specs = {key: TensorSpec.of(tensor, options.dtype) for key, tensor in shapes.items()}
        self.changes = {}  # key -> [LayerChange or WholeChange]
        for name, adapter in adapters:
            self._bind(name, adapter, shapes)

    def _bind(self, name, adapter, shapes):
        _check_places(name, adapter, shapes)
        metadata, unmerge = adapter.metadata, self.options.unmerge
        quant = metadata.quant if self.options.quant is None else self.options.quant
        whole = adapter.whole()
        if unmerge and whole:
            raise UserError(f"--unmerge cannot restore {len(whole)} tensors that {name} replaced whole (such as "
                            f"{next(iter(whole))}): the base's values are in none of the files")
        if unmerge and quant != "none":
            raise UserError(f"--unmerge cannot undo the {quant} quantization that {name} was merged with")
        for key, tensor in whole.items():
            due = expected_whole_shape(key, shapes)
            if tuple(tensor.shape) != due:
                raise UserError(f"{name}: {key} has shape {tuple(tensor.shape)}, and the base's is {due}; it was "
                                "trained on another model")
            if key not in self.specs:  # a time state, new to the base
                self.specs[key] = TensorSpec(due, self.options.dtype or shapes["emb.weight"].dtype)
            self.changes.setdefault(key, []).append(WholeChange(tensor))
        for module, params in adapter.modules().items():
            key = f"{module}.weight"
            check_params(f"{name}: {module}", metadata.variant, params, tuple(shapes[key].shape))
            self.changes.setdefault(key, []).append(LayerChange(params, replace(metadata, quant=quant)))

    def tensors(self, pairs, reports=None):
        """Yield the output's (key, tensor) in order, from the base's pairs; tensors that are new come last.

        A TensorReport of each changed tensor is appended to the list `reports`. Raises UserError for a result that
        is not finite.
        """
        seen = set()
        for key, tensor in pairs:
            seen.add(key)
            yield key, self._output(key, tensor, reports)
        for key, spec in self.specs.items():
            if key not in seen:
                yield key, self._output(key, torch.zeros(spec.shape), reports)

    @torch.no_grad()
    def _output(self, key, source, reports):
        dtype = self.specs[key].dtype
        tensor = self._changed(key, source, reports) if key in self.changes else source.to(dtype)
        if not all_finite(tensor):
            cause = ("in the base already" if not all_finite(source) else
                     f"after the merge, though not in the base: the change is too large for {dtype_name(dtype)}")
            raise UserError(f"{key} holds NaN or Inf, {cause}; nothing is written")
        return tensor

    def _changed(self, key, source, reports):
        """The tensor of the output in its dtype, on the CPU; computed in float32, band by band."""
        changes = self.changes[key]
        output = torch.empty(source.shape, dtype=self.specs[key].dtype)
        size = change = lost = 0.0  # sums of squares
        for start, stop in bands(source.shape, [item.granularity for item in changes]):
            part = source[start:stop].to(self.options.device)
            exact = self._applied(part, [item.rows(start, stop) for item in changes])
            output[start:stop] = exact
            part = part.float()
            size += square(part)
            change += square(exact - part)
            lost += square(output[start:stop].to(exact.device, torch.float32) - exact)
        if reports is not None:
            reports.append(TensorReport(key, ratio(change, size), ratio(lost, change)))
        return output

    def _applied(self, weight, changes):
        scale = self.options.scale
        if self.options.unmerge:
            for change in reversed(changes):
                weight = change.undo(weight, scale)
        else:
            for change in changes:
                weight = change.apply(weight, scale)
        return weight


def bands(shape, granularities):
    """(start, stop) of the bands of rows, about BAND elements each, in which a tensor can be computed."""
    rows, unit = shape[0], math.lcm(*granularities)
    if unit == 0:
        return [(0, rows)]
    row = math.prod(shape[1:])
    step = max(BAND // (row * unit), 1) * unit
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def square(tensor):
    return torch.linalg.vector_norm(tensor).item() ** 2


def ratio(part, whole):
    """sqrt(part / whole) of two sums of squares; 0 where the part is 0, inf where only the whole is."""
    if part == 0:
        return 0.0
    return math.sqrt(part / whole) if whole else math.inf


def merge_state_dict(base, adapters, options=MergeOptions(), reports=None):
    """A base state dict with adapters merged in: {key: tensor}, the base's keys, order and (unless options.dtype
    says otherwise) dtypes. Arguments and errors as in Merge."""
    return dict(Merge(base, adapters, options).tensors(base.items(), reports))


def check_params(name, variant, params, weight_shape):
    """Raise UserError unless the tensors of a `variant` adapter fit a weight (out, in)."""
    out, inner = weight_shape
    names = {"bone"} if "bone" in params else {"lora_A", "lora_B"}
    if variant in RESIDUAL_VARIANTS:
        names |= {"init_lora_A", "init_lora_B"}
    if set(params) != names:
        raise UserError(f"{name} holds {sorted(params)}, and a {variant} adapter has {sorted(names)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if "bone" in params:
        shape = shapes["bone"]
        rank = shape[0] if variant in ("bone", "bone-mini") else shape[-1]
        due = {"bone": (rank, out), "bone-mini": (rank, shape[-1]),
               "bat-in": (inner // rank, rank, rank), "bat-out": (out // rank, rank, rank)}[variant]
        fits = shape == due
        if variant == "bone-mini":
            fits = fits and out % shape[-1] == 0
        elif variant != "bone":
            fits = fits and out % rank == 0 and inner % rank == 0
        due = {"bone": due}
    else:
        rank = shapes["lora_A"][0]
        due = {name: (rank, inner) if name.endswith("A") else (out, rank) for name in names}
        fits = shapes == due
    if not fits:
        given, needed = (", ".join(map(str, group.values())) for group in (shapes, due))
        raise UserError(f"{name} is a {variant} adapter of shape {given}, and a base weight of shape {weight_shape} "
                        f"needs {needed} and a rank that divides it; it was trained on another model")


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

