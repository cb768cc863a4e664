"""List the checkpoints of a run, say how a run that ended goes on, and clear what one left that had not saved any."""

import errno
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import UserError
from .run_state import STATE, UNREADABLE, load_state

CHECKPOINTS = "checkpoints"  # their folder, in the run's folder
ANSWERS, LM_EVAL, ROWS = "answers.jsonl", "lm_eval.jsonl", "rows.jsonl"  # for --eval_data, --lm_eval, --answer_rows
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # by a disk
DIVERGED = "the run stopped, and nothing of that step was saved"  # told if numbers are no longer finite
# the files of what was trained, under all labels (products.py), and the number of the epoch
TRAINED = re.compile(r"(?:adapter|rwkv|merged|state)(?:-epoch-(\d+)|-best)?\.(?:safetensors|pth)")
UNSAVED = ".unsaved"  # marks the folder of a run that has not saved yet; what it holds may be cleared


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoint folders under proj_dir, oldest first: by samples seen, because a step's size may
    have changed."""

    def seen(checkpoint: Path) -> float:
        try:
            return int(load_state(checkpoint)["samples_seen"])
        except UNREADABLE:
            return math.inf  # read_run_state says what is wrong with it

    return sorted((path.parent for path in (folder / CHECKPOINTS).glob(f"step-*/{STATE}")), key=seen)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint folder under proj_dir, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def how_to_go_on(folder: Path) -> str:
    """Say what is left of a run that ended, and how it goes on."""
    last = find_checkpoint(folder)
    if not folder.is_dir():
        return "begin the run anew, or put the folder back and give --resume auto"
    if last is None:
        return "no checkpoint had been saved yet; the same command with --resume auto begins anew"
    return f"the last checkpoint is {last}; the same command with --resume goes on from there"


@contextmanager
def telling_refusals(folder: Path) -> Iterator[None]:
    """Turn an OSError of a refusing disk or a missing folder into a UserError, for writers into a run's folder that do
    not do so themselves: metrics.jsonl and the loggers. A logger's thread passes its error on to whoever writes next,
    so its own traceback is not printed."""
    hook = threading.excepthook

    def tell_others(thread: threading.ExceptHookArgs) -> None:
        if not refusal(thread.exc_value):
            hook(thread)

    threading.excepthook = tell_others
    try:
        yield
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
    """Remove the trained tensors and answers of a run that ended before its first checkpoint; without the mark UNSAVED,
    nothing."""
    if not (folder / UNSAVED).exists():
        return
    for file in folder.iterdir():
        if TRAINED.fullmatch(file.name) or file.name in (ANSWERS, LM_EVAL, ROWS):
            file.unlink()
