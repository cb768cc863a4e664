"""Check that adapters belong to a base: by generation, tensor names, number of blocks and fingerprint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..checkpoints.adapter_file import Adapter
from ..checkpoints.base import Base
from ..checkpoints.rwkv_peft_file import SOURCE as RWKV_PEFT
from ..checkpoints.tensors import TensorSpec
from ..cli.errors import UserError, short
from ..config import ModelConfig
from ..models import FAMILIES, family_named
from ..models.family import Family
from ..models.state import time_state_shapes

Adapters = Sequence[tuple[str | Path, Adapter]]  # (name, Adapter) in the order of their application


def check_generations(base: Base, adapters: Adapters) -> None:
    """Raise UserError if one of the (name, Adapter) pairs was trained on another generation than the Base's. Some
    layers of two generations share names and shapes but compute different things."""
    for name, adapter in adapters:
        version = adapter.metadata.generation
        if version not in ("", base.family.version):
            raise UserError(
                f"{name} was trained on an {family_named(version).name}, and {base.path} is an {base.family.name}: "
                "give the adapter's own base"
            )


def check_places(name: str | Path, adapter: Adapter, base: Base) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of all tensors that an Adapter may change in a Base, time states included. Raises UserError
    if one of the adapter's tensors has no place there."""
    shapes = {key: tuple(tensor.shape) for key, tensor in base.tensors.items()} | time_state_shapes(base.config)
    keys = [f"{module}.weight" for module in adapter.modules()] + list(adapter.whole())
    lost = [key for key in keys if key not in shapes]
    if lost:
        raise UserError(
            f"{name}: {len(lost)} of its {len(keys)} tensors have no place in the base: there is no "
            f"{short(lost[0])}, and the base has keys such as {list(shapes)[1]}; {_other_model(lost[0], base.family)}"
        )
    return shapes


def check_effect(name: str | Path, adapter: Adapter) -> None:
    """Raise UserError if no tensor of an Adapter changes anything."""
    method = adapter.metadata.method
    idle = () if method is None else method.tensors.idle
    effective = (tensor for key, tensor in adapter.tensors.items() if key.rpartition(".")[2] not in idle)
    if not any(torch.count_nonzero(tensor) for tensor in effective):
        raise UserError(f"{name} changes nothing: its tensors are all zero, as in an adapter that was never trained")


def check_depth(name: str | Path, adapter: Adapter, base: Base) -> None:
    """Raise UserError if an Adapter of RWKV-PEFT changes only the first blocks of a Base.

    RWKV-PEFT's files name no base, and an adapter on all blocks of a smaller model with the same widths looks like
    this. Any other set of blocks was chosen in training: a whole model has no gaps, and its last block gives its depth.
    """
    blocks, n_layer = blocks_of(adapter), base.config.n_layer
    first = {str(number) for number in range(len(blocks))}
    if adapter.modules() and adapter.metadata.source == RWKV_PEFT and blocks == first and 0 < len(blocks) < n_layer:
        raise UserError(
            f"{name} changes only the first {len(blocks)} of the {n_layer} blocks of {base.path}, as RWKV-PEFT's "
            "adapter on all blocks of a smaller model would, and names no base; give its own base, or, if its training "
            "chose these blocks, force it with --any_base"
        )


def blocks_of(adapter: Adapter) -> set[str]:
    """The numbers of the blocks that an Adapter has tensors for, as its keys spell them."""
    return {key.split(".")[1] for key in adapter.tensors if key.startswith("blocks.")}


def check_states(names: Sequence[str | Path], specs: Mapping[str, TensorSpec], config: ModelConfig) -> None:
    """Raise UserError if some layers of the output have a time state and others have none."""
    due = time_state_shapes(config)
    without = [key for key in due if key not in specs]
    if without and len(without) < len(due):
        raise UserError(
            f"{', '.join(map(str, names))}: time states of {len(due) - len(without)} of the model's "
            f"{len(due)} layers (there is no {without[0]}), and runtimes read a state for every layer "
            "or for none; give the whole file that the state tuning wrote"
        )


def check_unmerge(base: Base, adapters: Adapters) -> None:
    """Raise UserError if one of the (name, Adapter) pairs was trained on this very Base, which then does not hold the
    adapter."""
    for name, adapter in adapters:
        if adapter.metadata.base_fingerprint == base.fingerprint:
            raise UserError(
                f"--unmerge: {base.path} is the base that {name} was trained on, without the adapter; give the merged "
                "model as --base_model (or force it with --any_base)"
            )


def _other_model(key: str, family: Family) -> str:
    """Say which other model an adapter is for, if a base of this family lacks one of its keys."""
    layer = ".".join(key.split(".")[2:-1])
    owner = next((other.name for other in FAMILIES if layer in other.targets), family.name)
    if layer in family.targets or owner == family.name:
        return "it was trained on a model of other names or of more layers"
    return f"{layer} is a layer of {owner}, and the base is an {family.name}: give the adapter's own base"
