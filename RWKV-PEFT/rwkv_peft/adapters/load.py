"""Filling adapter layers, and what trains along with them, from the tensors of a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError, short
from .methods import adapter_parameter


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str | Path = "the adapter") -> None:
    """Copy {name: tensor} of an adapter file into a model whose layers are injected already.

    Every adapter parameter of the model must be in the file, and every tensor of the file in the model,
    with its shape; tensors that train whole keep the base's values where the file has none.
    Raises UserError otherwise, before anything is copied.
    """
    places: dict[str, torch.Tensor] = dict(model.named_parameters())
    places |= {key: buffer for key, buffer in model.named_buffers() if adapter_parameter(key)}
    own = [key for key in places if adapter_parameter(key)]
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in places]
    if not tensors or (own and len(missing) == len(own)):
        raise UserError(
            f"{name} matches nothing in the model: it holds {_some(list(tensors))}, and the model "
            f"awaits {_some(own)}; check --peft, --bone_mode and which model it was trained on"
        )
    if missing or unexpected:
        kinds = ((missing, "missing from the file"), (unexpected, "without a place in the model"))
        raise UserError(
            f"{name} does not fit the model: "
            + "; ".join(f"{len(keys)} tensors {what} ({_some(keys)})" for keys, what in kinds if keys)
            + "; use the same --peft, targets and --bone_mode as in its training"
        )
    for key, tensor in tensors.items():
        if tensor.shape != places[key].shape:
            raise UserError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(places[key].shape)}; use the rank and mode of its training, on the same base"
            )
    for key, tensor in tensors.items():
        places[key].copy_(tensor)


def _some(keys: Sequence[str], limit: int = 3) -> str:
    return (", ".join(map(short, keys[:limit])) + (", …" if len(keys) > limit else "")) or "nothing"
