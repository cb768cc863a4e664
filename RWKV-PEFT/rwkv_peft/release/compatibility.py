"""Checks that an adapter fits a base: its generation, names, shapes, number of blocks, and an effect."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..adapters.change import Params
from ..adapters.method import Method
from ..checkpoints.adapter_file import Adapter
from ..checkpoints.base import Base
from ..checkpoints.tensors import TensorSpec
from ..cli.errors import UserError, short
from ..cli.names import STATE_PARTS
from ..config import AdapterConfig, ModelConfig
from ..models import FAMILIES, family_named
from ..models.family import Family
from ..models.layout import state_parts, time_state_shapes

Adapters = Sequence[tuple[str | Path, Adapter]]  # (name, Adapter) in the order of their application
ONES = AdapterConfig(rank=1, mini_rank=1)  # the smallest sizes: only the number of dimensions is read


def check_generations(base: Base, adapters: Adapters) -> None:
    """Raise UserError if an adapter was trained on another generation. Some layers of two generations share names and
    shapes but compute different things."""
    for name, adapter in adapters:
        version = adapter.metadata.generation
        if version not in ("", base.family.version):
            raise UserError(
                f"{name} was trained on an {family_named(version).name}, and {base.path} is an {base.family.name}: "
                "give the adapter's own base"
            )


def check_fit(name: str | Path, adapter: Adapter, base: Base) -> None:
    """Raise UserError unless each tensor of an Adapter has a place in a Base and the shape that is due there, and at
    least one changes something."""
    modules, whole = adapter.modules(), adapter.whole()
    keys = [f"{module}.weight" for module in modules] + list(whole)
    shapes = {key: tuple(tensor.shape) for key, tensor in base.tensors.items()} | time_state_shapes(
        base.config, STATE_PARTS
    )
    if lost := [key for key in keys if key not in shapes]:
        raise UserError(
            f"{name}: {len(lost)} of its {len(keys)} tensors have no place in the base: there is no "
            f"{short(lost[0])}, and the base has keys such as {list(shapes)[1]}; {other_model(lost[0], base.family)}"
        )
    method = adapter.metadata.method
    idle = () if method is None else method.tensors.idle
    effective = (tensor for key, tensor in adapter.tensors.items() if key.rpartition(".")[2] not in idle)
    if not any(torch.count_nonzero(tensor) for tensor in effective):
        raise UserError(f"{name} changes nothing: its tensors are all zero, as in an adapter that was never trained")
    for key, tensor in whole.items():
        if tuple(tensor.shape) != shapes[key]:
            raise UserError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, and the base's is {shapes[key]}; it was trained on "
                "another model"
            )
    for module, params in modules.items():
        assert method is not None  # the readers refuse tensors of no method
        check_params(f"{name}: {module}", method, params, shapes[f"{module}.weight"])


def other_model(key: str, family: Family) -> str:
    """The phrase on the model that an adapter is for, if a base of this family lacks one of its keys."""
    layer = ".".join(key.split(".")[2:-1])
    owner = next((other.name for other in FAMILIES if layer in other.targets), family.name)
    if layer in family.targets or owner == family.name:
        return "it was trained on a model of other names or of more layers"
    return f"{layer} is a layer of {owner}, and the base is an {family.name}: give the adapter's own base"


def check_params(name: str, method: Method, params: Params, weight_shape: tuple[int, ...]) -> None:
    """Raise UserError unless the tensors of a Method's adapter fit a weight (out, in)."""
    if len(weight_shape) != 2:
        raise UserError(
            f"{name} is no linear layer: its weight has shape {weight_shape}, and an adapter changes a matrix; it was "
            "trained on another model"
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in params.items()}
    dims = {key: len(shape) for key, shape in method.tensors.shapes(ONES, *weight_shape).items()}
    if odd := [shape for key, shape in shapes.items() if 0 in shape or len(shape) != dims[key]]:
        raise UserError(
            f"{name} holds a tensor of shape {odd[0]}, which no {method.name} adapter has; the file is "
            "damaged, or describes itself wrongly"
        )
    config = method.tensors.config(params)
    misfit = method.tensors.misfit(config, *weight_shape)
    if misfit is not None and not misfit.too_large:
        raise UserError(
            f"{name} is a {method.name} adapter whose {misfit.setting} {misfit.value} {misfit.problem}, and the base "
            f"weight has shape {weight_shape}; it was trained on another model"
        )
    expected = method.tensors.shapes(config, *weight_shape)
    if any(shape != expected[key] for key, shape in shapes.items()):
        actual, needed = (", ".join(str(group[key]) for key in shapes) for group in (shapes, expected))
        raise UserError(
            f"{name} is a {method.name} adapter of shape {actual}, and a base weight of shape {weight_shape} needs "
            f"{needed}; it was trained on another model, or is damaged"
        )


def check_states(names: Sequence[str | Path], specs: Mapping[str, TensorSpec], config: ModelConfig) -> None:
    """Raise UserError if some layers of the output have a time state and others have none."""
    without = [key for key in time_state_shapes(config, state_parts(specs)) if key not in specs]
    if without:
        whole = config.n_layer - len({key.split(".")[1] for key in without})
        raise UserError(
            f"{', '.join(map(str, names))}: time states of {whole} of the model's "
            f"{config.n_layer} layers (there is no {without[0]}), and runtimes read a state for every layer "
            "or for none; give the whole file that the state tuning wrote"
        )


def blocks_of(adapter: Adapter) -> set[str]:
    """The numbers of the blocks that an Adapter has tensors for, as its keys spell them."""
    return {key.split(".")[1] for key in adapter.tensors if key.startswith("blocks.")}
