"""Optimizer groups: weight decay, layer-wise learning rates, and a method's own rates."""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from ..config import AdapterConfig
from .method import Method


class LearningRates(Protocol):
    """The part of a generation (a Family of models/) that is needed here."""

    def learning_rate(self, key: str) -> tuple[float, bool]: ...


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    family: LearningRates | None = None,
    ratios: Iterable[tuple[str, float]] = (),
    matrices_apart: bool = False,
) -> list[dict[str, Any]]:
    """Trainable parameters of a model as optimizer groups.

    With a family (a Family), RWKV-LM's rule for the generation: a factor of a parameter's rate, and True if it may
    decay. Without it, and besides it, tensors with two dimensions longer than 1 decay. ratios are (name, ratio) pairs,
    which multiply the rates of an adapter's tensors of that name.

    -> a list of dicts with "params", "weight_decay" and "lr_scale", which the schedule multiplies by its learning rate;
    empty groups are left out, and names and order depend on the model alone. With matrices_apart the matrices within
    blocks are in groups of their own, with their "shapes"; others have ().
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    ratio_of = dict(ratios)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, may_decay = (1.0, True) if family is None else family.learning_rate(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decay = weight_decay if may_decay and sum(size > 1 for size in shape) >= 2 else 0.0
        scale *= ratio_of.get(name.rpartition(".")[2], 1.0)
        groups.setdefault((scale, decay, matrices_apart and is_matrix(name, parameter)), []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        | ({"shapes": tuple(tuple(each.shape) for each in params if apart)} if matrices_apart else {})
        for (scale, decay, apart), params in groups.items()
    ]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True if a parameter is the matrix of a layer within a block, or a matrix or a row of them of its adapter."""
    part, *_, leaf = name.split(".")
    of_adapter = leaf.startswith(("bone", "lora_"))  # others' numbers are no matrix
    inner = part not in ("emb", "head") and (leaf == "weight" or of_adapter)
    return inner and parameter.dim() in (2, 2 + of_adapter) and min(parameter.shape[-2:]) > 1


def learning_ratios(method: Method | None, config: AdapterConfig) -> tuple[tuple[str, float], ...]:
    """The (tensor name, ratio) pairs of a Method under an AdapterConfig."""
    return () if method is None else tuple((name, getattr(config, field)) for name, field in method.rates)
