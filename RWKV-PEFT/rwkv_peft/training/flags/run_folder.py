"""Refuse a run's folder in which an entry that the run reads or writes is not a plain file or folder of its own. A link
would lead writes elsewhere, a pipe would be waited for, and a device has no end."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ...files.lock import LOCK
from ...names import CARD, METRICS, PICTURE, RUN
from ..saving.checkpoints import ANSWERS, CHECKPOINTS, LM_EVAL, ROWS, TRAINED, UNSAVED
from ..saving.keeping import HIDDEN

LOGS = "tensorboard"
FILES = (METRICS, RUN, ANSWERS, LM_EVAL, ROWS, PICTURE, CARD, UNSAVED, LOCK)
FOLDERS = (CHECKPOINTS, LOGS, "wandb", "swanlab")
STEP = ("step-", HIDDEN)  # how the name of a checkpoint's folder begins
OTHERS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder, and a file is due"),
    (stat.S_ISREG, "a file, and a folder is due"),
)


def check_run_folder(folder: Path) -> None:
    """Raise UserError if a run that begins or goes on in `folder` would read or write anything but files inside it."""
    for entry in entries_of(folder):
        if entry.name in FOLDERS:
            require(entry, stat.S_ISDIR)
        elif entry.name in FILES or TRAINED.fullmatch(entry.name):
            require(entry, stat.S_ISREG)
    for below in (CHECKPOINTS, LOGS):
        for entry in entries_below(folder / below):
            is_step = Path(entry.path).parent.name == CHECKPOINTS and entry.name.startswith(STEP)
            require(entry, stat.S_ISDIR if is_step or entry.is_dir(follow_symlinks=False) else stat.S_ISREG)


def require(entry: "os.DirEntry[str]", due: object) -> None:
    """Raise UserError unless an entry of a folder is of the kind that is due, stat.S_ISREG or stat.S_ISDIR."""
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except FileNotFoundError:  # another rank has removed it meanwhile
        return
    kind = stat.S_ISDIR if stat.S_ISDIR(mode) else stat.S_ISREG if stat.S_ISREG(mode) else None
    if kind is not due:
        what = next((words for is_kind, words in OTHERS if is_kind(mode)), "a device")
        raise UserError(
            f"{entry.path} is {what}: a run reads and writes nothing but files and folders inside its --proj_dir; move "
            "it away, or name another folder"
        )


def entries_below(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries of a folder and of all folders in it; links are not followed."""
    for entry in entries_of(folder):
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from entries_below(Path(entry.path))


def entries_of(folder: Path) -> list["os.DirEntry[str]"]:
    """The entries of a folder. [] if it is not there, because another rank may make and remove it at any moment, or if
    it cannot be read, which is refused when it is to be written."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
