"""A model's twin, which decodes as `rwkv-peft generate` does, while the model stays the plain module that others read,
train, copy and put adapters into."""

import torch
from torch import nn

from ..checkpoints.base import Base
from ..models.parts import LanguageModel
from ..models.state import is_time_state
from .stepping import step_by_tape
from .voices import sharing
from .weights import Product, decoding, place


class Twin:
    """The twin over a model's memory, made when it is first asked for, and anew after the weights were written to."""

    def __init__(self) -> None:
        self._twin: LanguageModel | None = None
        self._weights: list[tuple[int, int]] = []
        self._kinds: dict[str, type[nn.Module]] = {}  # of the generation's modules
        self._shapes: dict[str, torch.Size] = {}  # of their tensors

    def __reduce__(self) -> tuple[type["Twin"], tuple[()]]:
        return Twin, ()  # a copy of the model gets its own

    def of(self, model: LanguageModel, base: Base) -> LanguageModel:
        """Choose what decodes for a model of a Base: the twin, or the model itself on a GPU, where it is replayed, and
        if it has something in it that is not its generation's."""
        if not self._kinds:
            with torch.device("meta"):
                due = base.family.build(base.config)
            self._kinds, self._shapes = kinds_of(due), {key: x.shape for key, x in due.state_dict().items()}
        if not model.emb.weight.is_cpu or not self._is_plain(model):
            self._twin = None
            return model
        if self._twin is None or self._weights != weights_of(model):
            if not any(parameter.requires_grad for parameter in model.parameters()):
                place(model)  # which an optimizer's parameters must not be moved by
            self._twin = sharing(model, base, {}).requires_grad_(False).eval()
            decoding(self._twin)
            step_by_tape(self._twin)
            self._weights = weights_of(model)
        return self._twin

    def _is_plain(self, model: LanguageModel) -> bool:
        """True if the model has the modules of its generation, or products in blocks, and no hooks."""
        found = kinds_of(model)
        return (
            found.keys() == self._kinds.keys()
            and all(kind in (self._kinds[name], Product) for name, kind in found.items())
            and all(is_time_state(key) or self._shapes.get(key) == x.shape for key, x in model.state_dict().items())
            and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        )


def kinds_of(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules() if name}


def weights_of(model: nn.Module) -> list[tuple[int, int]]:
    """Return each parameter's address, and how often it was written to."""
    return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in model.parameters()]
