"""DeepSpeed's files of a checkpoint, read without running what they hold.

DeepSpeed unpickles them whole, so that a run's folder from a stranger could execute anything on --resume. They hold
tensors, plain containers and three small classes of its own, and here nothing else is read.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ..files.pth import read_pth

KNOWN = (LossScaler, ZeroStageEnum, fragment_address)  # which hold numbers and names alone


class TensorsAlone(TorchCheckpointEngine):
    """DeepSpeed's reader and writer, whose reading is read_pth's."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """What the file at `path` holds, on the CPU, whatever map_location says. Raises UserError as read_pth does."""
        with torch.serialization.safe_globals(list(KNOWN)):
            return copy.deepcopy(read_pth(path))  # the file may go while the run lasts, and a mapping would hold it


@contextmanager
def tensors_alone(engine: Any) -> Iterator[None]:
    """While it lasts, a DeepSpeed engine reads its files by TensorsAlone."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = TensorsAlone()
    try:
        yield
    finally:
        engine.checkpoint_engine = before
