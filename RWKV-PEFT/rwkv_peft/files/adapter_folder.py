"""An adapter's folder as Hugging Face peft saves it: adapter_config.json and the tensors that it describes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .atomic import atomic_write
from .pth import read_tensors
from .readable import choice_in, require_readable
from .safetensors_file import read_safetensors
from .settings_file import read_settings

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def is_adapter_folder(folder: str | Path) -> bool:
    """Return whether a folder is one, by its adapter_config.json."""
    return (Path(folder) / CONFIG).is_file()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the settings in a folder's adapter_config.json. Raises UserError if it is missing or cannot be read."""
    path = require_readable(
        Path(folder) / CONFIG,
        f"{folder} has no {CONFIG}, which peft's save_pretrained writes"
        + (choice_in(folder, ".pth", ".safetensors") or "; give a folder of its making, or an adapter's file"),
    )
    return read_settings(path)


def read_folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read a folder's {peft's key: tensor} from its safetensors file or, if there is none, from the torch file that
    safe_serialization=False writes."""
    if (folder / TENSORS).is_file():
        return read_safetensors(folder / TENSORS)[0]
    if (folder / PICKLED).is_file():
        return read_tensors(folder / PICKLED)
    raise UserError(f"{folder} has no {TENSORS} (nor {PICKLED}); is it a folder that peft saved?")


@contextmanager
def replacing(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the temporary paths to write a folder's CONFIG and TENSORS to. They get their names when both are complete.
    An old CONFIG is removed before the tensors change, so that a kill in between leaves a folder that readers refuse,
    not one that mixes old and new."""
    with atomic_write(folder / CONFIG) as config, atomic_write(folder / TENSORS) as tensors:
        yield config, tensors
        (folder / CONFIG).unlink(missing_ok=True)
