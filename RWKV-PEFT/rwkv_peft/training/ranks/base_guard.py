"""End a run whose base, or teacher, was overwritten: a memory-mapped file shows what is written into it."""

from typing import Any

import lightning.pytorch as pl
from torch import nn

from ...files.base import Base, Stamp
from ..step.lit import Lit


class BaseGuard(pl.Callback):
    """Raises UserError if a model's file was overwritten while weights are mapped from it. It checks at the start and
    after every micro batch, and must stand before the callbacks that record and save a step."""

    def __init__(self, base: Base, model: nn.Module) -> None:
        self.base, self.model, self.seen, self.mapped = base, model, base.stamp, True

    def on_train_start(self, trainer: Any, lit: Lit) -> None:
        self.look()
        self.mapped = is_mapped(self.base, self.model)

    def on_train_batch_end(self, trainer: Any, lit: Lit, *of_batch: Any) -> None:
        if self.mapped:
            self.look()

    def look(self) -> None:
        """Check the file again if its Stamp has changed since the last check."""
        if (now := Stamp.of(self.base.path)) != self.seen:
            self.base.require_unchanged()
            self.seen = now


def is_mapped(base: Base, model: nn.Module) -> bool:
    """Tell whether a weight of the model lies in the mapped file of its base, as on a CPU in the file's dtype."""
    mapped = {tensor.untyped_storage().data_ptr() for tensor in base.tensors.values()}
    held = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cpu")
    return any(tensor.untyped_storage().data_ptr() in mapped for tensor in held)
