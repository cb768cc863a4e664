"""Locks that let only one run at a time use a folder, and only one process at a time write a file."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import UserError
from .atomic import check_output, without_empty_folders
from .lock import Busy, hold

LOCK = ".run.lock"


@contextmanager
def alone_in(folder: Path, say: Callable[..., object] = print, flag: str = "--proj_dir") -> Iterator[None]:
    """Lock a run's folder, given as `flag`; make it if it is missing, and remove it again if it stays empty. Raises
    UserError if it cannot be written or another process holds it; if the file system has no locks, `say` tells so and
    the run goes on."""
    real = Path(os.path.realpath(folder))  # mkdir fails on a link whose target does not exist yet
    with without_empty_folders(real), ExitStack() as stack:
        check_output(flag, folder / "checkpoints" / "state.json", [])
        real.mkdir(parents=True, exist_ok=True)
        enter(stack, folder / LOCK, f"{flag} {folder}", "a run is training there", "another folder", say)
        yield


@contextmanager
def alone_at(path: Path, say: Callable[..., object] = print) -> Iterator[None]:
    """Be the only process that writes a file, given as --output, by a lock beside it; make its folder if it is missing,
    and remove that again if it stays empty. Raises UserError if another process holds the lock; if the file system has
    no locks, `say` tells so."""
    with without_empty_folders(path.parent), ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        enter(stack, lock, f"--output {path}", "another command is writing it", "another file", say)
        yield


def enter(stack: ExitStack, lock: Path, given: str, busy: str, instead: str, say: Callable[..., object]) -> None:
    """Hold a lock until the stack is closed. For messages, `given` is the flag and its path, `busy` what the lock's
    holder does, and `instead` what to name instead."""
    try:
        stack.enter_context(hold(lock))
    except Busy as error:
        raise UserError(f"{given}: {busy} ({error}); wait for it, or name {instead}") from None
    except OSError as error:
        say(f"output    {given} cannot be locked ({error}): start nothing else that writes there")
