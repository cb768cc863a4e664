"""That the weights of a run stay those of its base: a file that is mapped shows what is written into it."""

from typing import Any

import lightning.pytorch as pl
from torch import nn

from ..files.base import Base, Stamp
from .lit import Lit


class BaseGuard(pl.Callback):
    """Ends a run whose base was written over while its weights are mapped from that file: raises UserError before the
    step is recorded or saved. It stands before the callbacks that do so."""

    def __init__(self, base: Base) -> None:
        self.base, self.seen, self.mapped = base, base.stamp, True

    def on_train_start(self, trainer: Any, lit: Lit) -> None:
        self.look()
        self.mapped = is_mapped(self.base, lit.model)

    def on_train_batch_end(self, trainer: Any, lit: Lit, *of_batch: Any) -> None:
        if self.mapped:
            self.look()

    def look(self) -> None:
        """Judge the file anew where it has changed since it was judged."""
        if (now := Stamp.of(self.base.path)) != self.seen:
            self.base.require_unchanged()
            self.seen = now


def is_mapped(base: Base, model: nn.Module) -> bool:
    """Whether a weight of the model lies in the file of its base, which it does on a CPU in the dtype of the file."""
    mapped = {tensor.untyped_storage().data_ptr() for tensor in base.tensors.values()}
    held = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cpu")
    return any(tensor.untyped_storage().data_ptr() in mapped for tensor in held)
