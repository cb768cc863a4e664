"""Adapters in Python: put one into a Model, save its trained tensors, merge it into its base."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .. import __version__
from ..adapters.inject import InjectReport, check_adapter, inject, load_tensors
from ..adapters.methods import adapter_parameter, method_of
from ..checkpoints.adapter_file import Adapter, AdapterMetadata, Origin
from ..checkpoints.adapter_file import save_adapter as write_adapter
from ..checkpoints.adapters import AdapterSource
from ..checkpoints.atomic import atomic_write, check_output, require_room
from ..checkpoints.base import open_base
from ..checkpoints.tensors import DTYPES, stream_tensors, write_pth
from ..cli.errors import UserError
from ..cli.names import NONE, STATE, all_finite, is_number
from ..config import CHOICES, AdapterConfig
from ..inference.weights import rounded
from ..models.layout import is_time_state, state_parts
from ..release.merge import Merge, MergeOptions, check_fingerprints
from .model import Model, Source, require_one_of, sources_in

KINDS = MappingProxyType({int: "a whole number", float: "a number", str: "a text", tuple: "a list of names"})
NOT_SETTINGS = ("method", "load", "init")  # fields of AdapterConfig that add_adapter has arguments of its own for


def add_adapter(model: Model, method: str = "bone", *, load: Source | None = None, **settings: Any) -> InjectReport:
    """Put an adapter into a model's linear layers -> how much trains. All else is frozen.

    method is a word of --peft. settings are its fields: rank, mode ("bat-in" by default), alpha, … targets such as
    ["att.key"] choose the layers. train_parts=["state"] or ["ln", "time"] train along. quant="nf4" keeps the frozen
    matrices quantized. With method="none" only train_parts train. load goes on from an adapter file, with that file's
    method and settings. torch.manual_seed makes random starts repeatable. Raises UserError.
    """
    network, base = model.network, model.base
    if model.adapter is not None:
        raise UserError(
            "the model has an adapter already; save it with rp.save_adapter, and load the base with it in adapters="
        )
    precision_of(model)
    if rounded(network):
        raise UserError(
            "the model's matrices are rounded to blocks, on which no adapter trains; load it without weights=, and "
            "give quant='int8' here to keep the frozen ones small"
        )
    loaded = None
    if load is None:
        config = config_of(method, settings)
    elif settings or method != AdapterConfig.method:
        raise UserError(f"load={str(load)!r} tells its method and settings itself; leave the others out")
    else:
        source = load if isinstance(load, AdapterSource) else AdapterSource(load)
        loaded = source.read(base.tensors)
        loaded.metadata.require_base(source.path, base, "load the base that it was trained on")
        config = loaded.config(base.family)
        if any(map(is_time_state, loaded.tensors)):
            parts = state_parts(loaded.tensors)
            config = replace(config, train_parts=(*config.train_parts, STATE), state_parts=parts)
    if not config.targets and config.method != NONE:
        config = replace(config, targets=base.family.targets)
    layers = check_adapter(config, base.linear_shapes, (*base.family.parts, STATE))
    chosen = method_of(config)
    if loaded is None and chosen is not None and chosen.held is not None and chosen.held.from_gradient:
        raise UserError(f"method={method!r} begins from gradients of the data; train it with train.py --peft {method}")
    if STATE in config.train_parts:
        network.tune_states(model.begun(), config.state_parts)
        model.start = None  # it is the network's own now
    report = inject(network, config, layers, family=base.family, initial=loaded.tensors if loaded else None)
    if loaded is not None:
        load_tensors(network, loaded.tensors)
    model.adapter = config
    model.train()
    return report


def config_of(method: str, settings: Mapping[str, Any]) -> AdapterConfig:
    """The AdapterConfig of add_adapter's arguments. Raises UserError for a name or type that is none of its fields."""
    if method not in CHOICES:
        raise UserError(f"method={method!r} is not one of {', '.join(CHOICES)}")
    known = {field.name: field.default for field in fields(AdapterConfig) if field.name not in NOT_SETTINGS}
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"{name}={value!r} is no setting of an adapter; known are {', '.join(known)}")
        kind: type = type(known[name])
        values[name] = tuple(value) if kind is tuple and isinstance(value, (list, set)) else value
        if not (is_number(values[name]) if kind is float else isinstance(values[name], kind)):
            raise UserError(f"{name}={value!r}: {KINDS[kind]} is due")
    config = AdapterConfig(method=method, **values)
    if config.method == NONE and not config.train_parts:
        raise UserError(
            "method='none' adds no adapter; name train_parts, or train a whole model with train.py --peft none"
        )
    return config


def save_adapter(model: Model, path: str | Path) -> None:
    """Write the tensors that rp.add_adapter made trainable as train.py writes them: a .safetensors that merging,
    checking and generating take. Raises UserError if the model has no adapter, if a value is not finite, or if the file
    cannot be written."""
    if model.adapter is None:
        raise UserError("the model has no adapter to save; rp.add_adapter puts one in")
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: a name that ends in .safetensors is due")
    network, base = model.network, model.base
    trained = {name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad}
    constants = {name: buffer for name, buffer in network.named_buffers() if adapter_parameter(name)}
    tensors = {name: tensor.cpu() for name, tensor in (trained | constants).items()}
    if broken := next((name for name, tensor in tensors.items() if not all_finite(tensor)), None):
        raise UserError(f"{broken} holds NaN or Inf: the training diverged; lower its learning rate")
    metadata = AdapterMetadata.from_config(model.adapter, base.fingerprint, precision_of(model), base.family.version)
    versions = f"rwkv_peft {__version__}, torch {torch.__version__}"
    write_adapter(path, tensors, replace(metadata, origin=Origin(base=Path(base.path).name, versions=versions)))


def merge(
    base: str | Path,
    adapters: Source | Sequence[Source] | Mapping[Source, float],
    output: str | Path,
    *,
    precision: str | None = None,
    device: str = "cpu",
    any_base: bool = False,
) -> None:
    """Merge one adapter, or several in the order of their training, into a base's .pth. The .pth output has the bits of
    merge_bone.py's.

    {adapter: scale} multiplies the change of each; precision is the output's, "bf16", "fp16" or "fp32" (default: the
    base's); any_base takes an adapter of another base of the same shape. Writes nothing if it raises UserError.
    """
    require_one_of("precision", precision, DTYPES)
    if Path(output).suffix != ".pth":
        raise UserError(
            f"output={str(output)!r}: a name that ends in .pth is due; rwkv-peft convert makes other formats"
        )
    sources = sources_in([adapters] if isinstance(adapters, (str, Path, AdapterSource)) else adapters)
    check_output("output", output, [("base", base), *(("an adapter", source.path) for source in sources)])
    opened = open_base(base)
    named: list[tuple[str | Path, Adapter]] = [(source.path, source.read(opened.tensors)) for source in sources]
    bound = Merge(opened, named, MergeOptions(DTYPES.get(precision or ""), device=device))
    if not any_base:
        check_fingerprints(opened, named)
    require_room("output", output, sum(spec.numel * spec.dtype.itemsize for spec in bound.specs.values()))
    with atomic_write(output) as temporary:
        write_pth(temporary, bound.specs, bound.bands(stream_tensors(base)))


def precision_of(model: Model) -> str:
    """The precision of a model in which adapters train: "fp32" or "bf16". Raises UserError for another dtype."""
    dtype = model.network.emb.weight.dtype
    for name in ("bf16", "fp32"):  # fp16 takes a loss scale
        if DTYPES[name] == dtype:
            return name
    raise UserError(f"the model is in {dtype}, in which no adapter trains; load it with precision='fp32' or 'bf16'")
