"""Remove old saves of a run (--keep_checkpoints), so that a kill leaves each checkpoint whole or gone."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from .checkpoints import CHECKPOINTS, TRAINED, list_checkpoints

Thing = TypeVar("Thing")
KEPT = 2  # checkpoints, if --keep_checkpoints does not say how many; the files of all epochs stay then
HIDDEN = ".step-"  # how the name of a checkpoint begins while it is written or removed


def discard_old(folder: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints of a run, and the files of all but the newest `keep` saved epochs. 0
    keeps all; None keeps KEPT checkpoints and all files. The newest save must be on the disk by then."""
    clear_hidden(folder)
    for checkpoint in all_but(list_checkpoints(folder), KEPT if keep is None else keep):
        remove(checkpoint)
    matches = ((file, TRAINED.fullmatch(file.name)) for file in folder.iterdir())
    epochs = {file: int(match[1]) for file, match in matches if match and match[1]}
    old = all_but(sorted(set(epochs.values())), keep or 0)
    for file, epoch in epochs.items():
        if epoch in old:
            file.unlink()


def all_but(things: Sequence[Thing], newest: int) -> Sequence[Thing]:
    """All but the last `newest` of some things; none for 0."""
    return things[:-newest] if newest else []


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is hidden first, because a kill may leave some of its files."""
    hidden = checkpoint.with_name(f".{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def clear_hidden(folder: Path) -> None:
    """Remove the checkpoints that a run was writing or removing when it was killed."""
    for leftover in (folder / CHECKPOINTS).glob(f"{HIDDEN}*"):
        shutil.rmtree(leftover)
