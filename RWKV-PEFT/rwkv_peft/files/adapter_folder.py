"""The folder of an adapter as Hugging Face peft saves it: adapter_config.json, and the tensors that it describes."""

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
    """Whether a folder is one."""
    return (Path(folder) / CONFIG).is_file()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings in a folder's adapter_config.json. Raises UserError where there are none that can be read."""
    path = require_readable(
        Path(folder) / CONFIG,
        f"{folder} has no {CONFIG}, which peft's save_pretrained writes"
        + (choice_in(folder, ".pth", ".safetensors") or "; give a folder of its making, or an adapter's file"),
    )
    return read_settings(path)


def read_folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """{peft's key: tensor} of a folder, as safetensors or, of safe_serialization=False, torch wrote them. Raises
    UserError where neither is there or can be read."""
    if (folder / TENSORS).is_file():
        return read_safetensors(folder / TENSORS)[0]
    if (folder / PICKLED).is_file():
        return read_tensors(folder / PICKLED)
    raise UserError(f"{folder} has no {TENSORS} (nor {PICKLED}); is it a folder that peft saved?")


@contextmanager
def replacing(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield where CONFIG and TENSORS of a folder are to be written. They get their names when both are complete; an old
    CONFIG goes before the tensors change, so that a kill in between leaves a folder that readers refuse, and not one of
    two halves."""
    with atomic_write(folder / CONFIG) as config, atomic_write(folder / TENSORS) as tensors:
        yield config, tensors
        (folder / CONFIG).unlink(missing_ok=True)
