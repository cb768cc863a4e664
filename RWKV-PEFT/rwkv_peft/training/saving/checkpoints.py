"""List and remove the checkpoints of a run, and say how a run that ended goes on.

A kill leaves each checkpoint whole or gone, because one is hidden while it is written or removed.
"""

import errno
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ...checkpoints.atomic import CannotWrite
from ...cli.errors import UNREADABLE, UserError, in_line
from .run_state import STATE, read_state

CHECKPOINTS = "checkpoints"  # their folder, in the run's folder
ANSWERS, LM_EVAL, ROWS = "answers.jsonl", "lm_eval.jsonl", "rows.jsonl"  # for --eval_data, --lm_eval, --answer_rows
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # by a disk
DIVERGED = "the run stopped, and nothing of that step was saved"  # told if numbers are no longer finite
# the files of what was trained, under all labels (products.py), and the number of the epoch
TRAINED = re.compile(r"(?:adapter|rwkv|merged|state)(?:-epoch-(\d+)|-best)?\.(?:safetensors|pth)")
UNSAVED = ".unsaved"  # marks the folder of a run that has not saved yet; what it holds may be cleared
KEPT = 2  # checkpoints, if --keep_checkpoints does not say how many; the files of all epochs stay then
HIDDEN = ".step-"  # how the name of a checkpoint begins while it is written or removed
Thing = TypeVar("Thing")


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoint folders under proj_dir by samples seen, because a step's size may have changed."""

    def seen(checkpoint: Path) -> float:
        try:
            return float(read_state(checkpoint)["samples_seen"])
        except UNREADABLE:
            return math.inf  # read_run_state says what is wrong with it

    return sorted((path.parent for path in (folder / CHECKPOINTS).glob(f"step-*/{STATE}")), key=seen)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint folder under proj_dir, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def saved_state(folder: str, resume: str) -> dict[str, Any]:
    """The state.json that a run goes on from, unchecked; {} if it begins (resume is ""), or if the file cannot be read,
    which read_run_state reports."""
    checkpoint = find_checkpoint(Path(folder)) if resume else None
    try:
        return {} if checkpoint is None else read_state(checkpoint)
    except UNREADABLE:
        return {}


def how_to_go_on(folder: Path) -> str:
    """Say what is left of a run that ended, and how it goes on."""
    last = find_checkpoint(folder)
    if not folder.is_dir():
        return "begin the run anew, or put the folder back and give --resume auto"
    if last is None:
        return "no checkpoint had been saved yet; the same command with --resume auto begins anew"
    return in_line(f"the last checkpoint is {last}; the same command with --resume goes on from there")


@contextmanager
def telling_refusals(folder: Path) -> Iterator[None]:
    """Turn an OSError of a refusing disk or a missing folder into a UserError, for writers into a run's folder that do
    not do so themselves: metrics.jsonl and the loggers. A logger's thread passes its error on to whoever writes next,
    so its own traceback is not printed. These, and refusals of writers and of readers, say how the run goes on."""
    hook = threading.excepthook

    def tell_others(thread: threading.ExceptHookArgs) -> None:
        if not refusal(thread.exc_value):
            hook(thread)

    threading.excepthook = tell_others
    try:
        yield
    except CannotWrite as error:
        raise UserError(f"{error}; {how_to_go_on(folder)}") from error
    except OSError as error:
        if not (reason := refusal(error)):
            raise
        raise UserError(f"cannot write in {folder}: {reason}; {how_to_go_on(folder)}") from error
    finally:
        threading.excepthook = hook


def refusal(error: BaseException | None) -> str:
    """Say why a disk refused, or which folder is gone that was to be written into; "" for other errors."""
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    if error.errno in REFUSALS:
        return os.strerror(error.errno).lower()
    folder = os.path.dirname(os.fsdecode(error.filename or b"."))
    gone = error.errno in (errno.ENOENT, errno.ENOTDIR) and folder and not os.path.isdir(folder)
    return f"{folder} is no folder any more: deleted, moved or replaced while the run went on" if gone else ""


def clear_unsaved(folder: Path) -> None:
    """Remove the trained tensors and answers of a run that is marked as UNSAVED."""
    if not (folder / UNSAVED).exists():
        return
    for file in folder.iterdir():
        if TRAINED.fullmatch(file.name) or file.name in (ANSWERS, LM_EVAL, ROWS):
            file.unlink()


def is_of_connection(error: BaseException) -> bool:
    """Tell whether an error is that of a collective whose connection to another rank broke."""
    from torch.distributed import DistError  # flags are judged before torch is imported

    return isinstance(error, DistError) or "gloo" in str(error).lower()


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
