"""Check that the disk of a run has room for its first save."""

from pathlib import Path
from types import MappingProxyType

from ...config import RunConfig
from ...files.atomic import require_room
from ...files.pth_writer import DTYPES

# bytes a number that trains: a float32 copy, and the moments; muon has both of Adam's for what is no matrix of a block
OPTIMIZER = MappingProxyType({"adamw": 12, "adamw8bit": 6, "lion": 8, "muon": 12, "schedule_free": 12})
SMALLEST = 2  # least bytes of a number in a model's file


def checkpoint_size(trains: int, optim: str) -> int:
    """The bytes of a checkpoint's tensors, beside the file of what trained, if `trains` numbers train by --optim."""
    return OPTIMIZER[optim] * trains


def require_room_to_save(folder: Path, config: RunConfig, trains: int) -> None:
    """Raise UserError if the disk of a run's folder cannot hold one save, the least that any run leaves."""
    item = DTYPES[config.train.precision].itemsize
    file = (SMALLEST if config.adapter.whole_model else item) * trains
    require_room("--proj_dir", folder, file + checkpoint_size(trains, config.train.optim), "a save")
