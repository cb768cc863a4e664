"""A run's checkpoints on the disk: list, verify and remove them, and describe how a run that ended goes on.

proj_dir/checkpoints/step-NNNNNNNN/ holds the optimizer's state, the trained tensors, and state.json, the manifest: the
run's place and identity, and the bytes and CRC-32 of each file. The folder is hidden while it is written or removed: a
kill leaves each checkpoint whole or gone. Nothing here imports torch: flags are judged before.
"""

import errno
import json
import math
import re
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ...checkpoints.atomic import CannotWrite
from ...checkpoints.readable import reading
from ...cli.errors import UserError, in_line

CHECKPOINTS = "checkpoints"  # their folder, in the run's folder
STATE, OPTIMIZER = "state.json", "optimizer"  # a checkpoint's manifest, and its folder of the optimizer's state
CHECKSUM = "crc32"  # the manifest's entry for itself
ANSWERS, ROWS = "answers.jsonl", "rows.jsonl"  # for --eval_data and --answer_rows
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # by a disk
DIVERGED = "the run stopped, and nothing of that step was saved"  # printed if numbers are no longer finite
# the files of the trained tensors, under all labels (products.py), and the number of the epoch
TRAINED = re.compile(r"(?:adapter|rwkv|merged|state)(?:-epoch-(\d+)|-best)?\.(?:safetensors|pth)")
UNSAVED = ".unsaved"  # marks the folder of a run that has not saved yet, which a new run may clear
KEPT = 2  # checkpoints, if --keep_checkpoints gives no number; the files of all epochs stay then
HIDDEN = ".step-"  # the beginning of a checkpoint's name while it is written or removed
CHUNK = 1 << 24
Thing = TypeVar("Thing")


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoint folders under proj_dir by samples seen: the size of a step may have changed."""

    def seen(checkpoint: Path) -> float:
        try:
            return float(read_state(checkpoint)["samples_seen"])
        except UserError:  # which a run that goes on from it reports
            return math.inf

    return sorted((path.parent for path in (folder / CHECKPOINTS).glob(f"step-*/{STATE}")), key=seen)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint folder under proj_dir, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def saved_state(folder: str, resume: str) -> dict[str, Any]:
    """The state.json that a run goes on from, unchecked. {} if it begins (resume is "") or if the file cannot be read:
    read_run_state reports that."""
    checkpoint = find_checkpoint(Path(folder)) if resume else None
    try:
        return {} if checkpoint is None else read_state(checkpoint)
    except UserError:
        return {}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The entries of a checkpoint's state.json. Raises UserError if it cannot be read or was changed."""
    path = checkpoint / STATE
    with reading(path, remedy=remedy_of(checkpoint, of_optimizer=False)):
        state: dict[str, Any] = json.loads(path.read_text())
        if state.pop(CHECKSUM, None) != checksum_of(state):
            raise ValueError("it was changed after it was written: its checksum differs")
    return state


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state.json with its checksum."""
    path.write_text(json.dumps({**state, CHECKSUM: checksum_of(state)}, indent=1))


def checksum_of(state: Mapping[str, Any]) -> str:
    """The CRC-32 of a state's entries, as eight hexadecimal digits, in any layout of the file."""
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"


def record_of(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest: {"bytes", "crc32"}."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return {"bytes": path.stat().st_size, "crc32": f"{value:08x}"}


def require_files(checkpoint: Path, records: Mapping[str, Any], fresh_optimizer: bool, contents: bool = False) -> None:
    """Raise UserError for a file of a checkpoint that is missing or of another size than in the manifest or, with
    `contents`, of another checksum. With fresh_optimizer the optimizer's state is not checked."""
    for name, record in records.items():
        path, of_optimizer = checkpoint / name, Path(name).parts[:1] == (OPTIMIZER,)
        if fresh_optimizer and of_optimizer:
            continue
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            problem = f"is missing or not of the {record['bytes']:,} bytes that were saved"
        elif contents and record_of(path) != record:
            problem = "differs from the file that was saved: its checksum is another, and the disk or a copy damaged it"
        else:
            continue
        raise UserError(f"--resume: {path} {problem}; {remedy_of(checkpoint, of_optimizer)}")


def remedy_of(checkpoint: Path, of_optimizer: bool = True) -> str:
    """The remedy if a checkpoint, or only the optimizer's state in it, is of no use."""
    fresh = ", or add --fresh_optimizer to go on without the optimizer's state" if of_optimizer else ""
    return f"delete {checkpoint} to resume from an older checkpoint{fresh}"


def how_to_go_on(folder: Path) -> str:
    """A sentence on the last checkpoint of a run that ended and on how the run goes on."""
    last = find_checkpoint(folder)
    if not folder.is_dir():
        return "begin the run anew, or put the folder back and give --resume auto"
    if last is None:
        return "no checkpoint had been saved yet that --resume could go on from"
    return in_line(f"the last checkpoint is {last}; the same command with --resume goes on from there")


@contextmanager
def telling_refusals(folder: Path) -> Iterator[None]:
    """Turn the error of a disk that refuses, or of a run's folder that is gone, into a UserError with how_to_go_on.

    It surrounds all writers into the folder, also the loggers of other libraries. A logger's thread passes its error on
    to the next call, so its own traceback is not printed.
    """

    def refused(error: BaseException | None) -> bool:
        return isinstance(error, OSError) and (error.errno in REFUSALS or not folder.is_dir())

    def print_others(thread: threading.ExceptHookArgs) -> None:
        if not refused(thread.exc_value):
            hook(thread)

    hook, threading.excepthook = threading.excepthook, print_others
    try:
        yield
    except CannotWrite as error:
        raise UserError(f"{error}; {how_to_go_on(folder)}") from error
    except OSError as error:
        if not refused(error):
            raise
        raise UserError(f"cannot write in {folder}: {str(error.strerror).lower()}; {how_to_go_on(folder)}") from error
    finally:
        threading.excepthook = hook


def is_of_connection(error: BaseException) -> bool:
    """True if an error means that a collective lost its connection to another rank."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()


def discard_old(folder: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints of a run; also the files of all but the newest `keep` saved epochs.
    0 keeps all; None keeps KEPT checkpoints and all files. The newest save must be on the disk by then."""
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
    """Remove a checkpoint. It is hidden first: a kill may leave some of its files."""
    hidden = checkpoint.with_name(f".{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def clear_hidden(folder: Path) -> None:
    """Remove the checkpoints that a run was writing or removing when it was killed."""
    for leftover in (folder / CHECKPOINTS).glob(f"{HIDDEN}*"):
        shutil.rmtree(leftover)


def clear_unsaved(folder: Path) -> None:
    """Remove the trained tensors and answers of a run that is marked as UNSAVED."""
    if not (folder / UNSAVED).exists():
        return
    for file in folder.iterdir():
        if TRAINED.fullmatch(file.name) or file.name in (ANSWERS, ROWS):
            file.unlink()
