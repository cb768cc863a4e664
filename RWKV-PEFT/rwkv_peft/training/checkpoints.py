"""The checkpoints of a run: which there are, how a run that ended goes on, and what one leaves that died before its
first."""

import errno
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .run_state import STATE, UNREADABLE, load_state

CHECKPOINTS = "checkpoints"  # the folder of them in a run's own
ANSWERS, LM_EVAL, ROWS = "answers.jsonl", "lm_eval.jsonl", "rows.jsonl"  # of --eval_data, --lm_eval, --answer_rows
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # of a disk
DIVERGED = "the run stopped, and nothing of that step was saved"  # what one says whose numbers are no longer finite
# what was trained, of all labels (products.py)
TRAINED = re.compile(r"(adapter|rwkv|merged|state)(-epoch-\d+|-best)?\.(safetensors|pth)")
UNSAVED = ".unsaved"  # in the folder of a run until its first checkpoint is complete: all else there is of no use


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders under proj_dir, oldest first: by samples seen, as a step may have changed its
    size."""

    def seen(checkpoint: Path) -> float:
        try:
            return int(load_state(checkpoint)["samples_seen"])
        except UNREADABLE:
            return math.inf  # read_run_state says what is wrong with it

    return sorted((path.parent for path in (folder / CHECKPOINTS).glob(f"step-*/{STATE}")), key=seen)


def find_checkpoint(folder: Path) -> Path | None:
    """Newest complete checkpoint folder under proj_dir, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def how_to_go_on(folder: Path) -> str:
    """What is left of a run that ended, and how it goes on."""
    last = find_checkpoint(folder)
    if not folder.is_dir():
        return "begin the run anew, or put the folder back and give --resume auto"
    if last is None:
        return "no checkpoint had been saved yet; the same command with --resume auto begins anew"
    return f"the last checkpoint is {last}; the same command with --resume goes on from there"


@contextmanager
def telling_refusals(folder: Path) -> Iterator[None]:
    """Make a UserError of what a disk, or a folder that is gone, refuses to those who write into a run's folder and do
    not say so themselves: metrics.jsonl, and loggers, as they write or close. A logger's thread hands what it was
    refused to whoever writes next, so that its own stack says nothing more."""
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
    """What a disk refused, in words, or which folder is gone that something was to be written into; "" for other
    errors."""
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    if error.errno in REFUSALS:
        return os.strerror(error.errno).lower()
    folder = os.path.dirname(os.fsdecode(error.filename or b"."))
    gone = error.errno in (errno.ENOENT, errno.ENOTDIR) and folder and not os.path.isdir(folder)
    return f"{folder} is no folder any more: deleted, moved or replaced while the run went on" if gone else ""


def clear_unsaved(folder: Path) -> None:
    """Remove the trained tensors and answers that a run left which ended before its first checkpoint; nothing where
    none did."""
    if not (folder / UNSAVED).exists():
        return
    for file in folder.iterdir():
        if TRAINED.fullmatch(file.name) or file.name in (ANSWERS, LM_EVAL, ROWS):
            file.unlink()
