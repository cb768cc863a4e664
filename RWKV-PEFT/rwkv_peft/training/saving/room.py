"""Check that the disk of a run has room for its first save."""

from pathlib import Path
from types import MappingProxyType

from ...config import RunConfig
from ...files.dtypes import DTYPES
from ...files.room import require_room

# bytes a number that trains: a float32 copy, and the moments
OPTIMIZER = MappingProxyType({"adamw": 12, "adamw8bit": 6, "lion": 8, "muon": 12, "schedule_free": 12})
MATRIX = MappingProxyType({**OPTIMIZER, "muon": 8})  # of the matrices of blocks and adapters
SMALLEST = 2  # least bytes of a number in a model's file


def optimizer_size(optim: str, trains: int, matrices: int) -> int:
    """The bytes of an optimizer, and of a checkpoint's tensors beside the file of what trained, if `trains` numbers
    train by --optim, `matrices` of them in matrices."""
    return OPTIMIZER[optim] * (trains - matrices) + MATRIX[optim] * matrices


def require_room_to_save(folder: Path, config: RunConfig, trains: int) -> None:
    """Raise UserError if the disk of a run's folder cannot hold one save, the least that any run leaves."""
    item = DTYPES[config.train.precision].itemsize
    file = (SMALLEST if config.adapter.whole_model else item) * trains
    require_room("--proj_dir", folder, file + optimizer_size(config.train.optim, trains, trains), "a save")
