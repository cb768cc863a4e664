"""Locks: a file that one process holds at a time, so that one run uses a folder and one process writes a file.

filelock holds the file, and the system releases it when the process ends, however it ends. A description of the holder
lies beside it, in FILE.json: its host, its process, and the time since when.
"""

import errno
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..cli.errors import NotNow
from ..system import PLAIN, can_share
from .atomic import CannotWrite, check_output, without_empty_folders, write_failure, write_text
from .readable import object_in

PATIENCE = 0.5  # seconds in which a process that only looks at a lock (holder) lets go of it
LOCK = ".run.lock"


class Busy(Exception):
    """Another process holds the file; the text describes that process."""


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock file `path` in an existing folder, and remove it afterwards. Raises Busy if another process holds
    it, OSError if the file cannot be made or its file system has no locks."""
    from filelock import FileLock, Timeout  # flags are checked, and --help printed, without any package

    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=0.01)
    except Timeout:
        raise Busy(describe(object_in(beside(path)))) from None
    try:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        write_text(beside(path), json.dumps({"host": platform.node(), "process": os.getpid(), "since": now}))
        yield
    finally:
        for file in (beside(path), path):  # while it is held, so that whoever has opened it sees that it is gone
            with suppress(OSError):  # a folder that is read-only by now must not hide the body's own exception
                file.unlink()
        lock.release()


def beside(path: Path) -> Path:
    """The path of the description of a lock file's holder."""
    return path.with_name(f"{path.name}.json")


def describe(holder: dict[str, Any]) -> str:
    """A holder in words: "process 12 on node-3, since 2026-01-31 12:00:00"."""
    if not holder:
        return "another process"  # which has written nothing yet
    return f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"


def holder(path: Path) -> dict[str, Any] | None:
    """The description of the process that holds a lock file (host, process, since), {} if it has written none; None if
    no process holds the file."""
    try:
        handle = os.open(path, os.O_RDONLY | PLAIN)
    except OSError:
        return None
    with open(handle) as file:
        return None if can_share(file) else object_in(beside(path))


@contextmanager
def alone_in(folder: Path, say: Callable[..., object] = print, flag: str = "--proj_dir") -> Iterator[None]:
    """Lock a run's folder, given as `flag`; make it if it is missing, and remove it again if it stays empty. Raises
    UserError if it cannot be written, NotNow if another process holds it."""
    real = Path(os.path.realpath(folder))  # mkdir fails on a link to a folder that does not exist yet
    with without_empty_folders(real), ExitStack() as stack:
        check_output(flag, folder / "checkpoints" / "state.json", [])
        real.mkdir(parents=True, exist_ok=True)
        enter(stack, folder / LOCK, f"{flag} {folder}", "a run is training there", "another folder", say)
        yield


@contextmanager
def alone_at(path: Path, say: Callable[..., object] = print) -> Iterator[None]:
    """Be the only process that writes a file, given as --output, by a lock beside it; make its folder if it is missing,
    and remove that again if it stays empty. Raises NotNow if another process holds the lock."""
    with without_empty_folders(path.parent), ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        enter(stack, lock, f"--output {path}", "another command is writing it", "another file", say)
        yield


def enter(stack: ExitStack, lock: Path, given: str, busy: str, instead: str, say: Callable[..., object]) -> None:
    """Hold a lock until the stack is closed. For messages, `given` is the flag and its path, `busy` the work of the
    lock's holder, and `instead` a name to give instead. If the file system has no locks, `say` prints a warning."""
    try:
        stack.enter_context(hold(lock))
    except Busy as error:
        raise NotNow(f"{given}: {busy} ({error}); wait for it, or name {instead}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise CannotWrite(f"cannot write {lock}: {write_failure(error, lock)}; name {instead}") from error
        lock.unlink(missing_ok=True)
        say(f"output    {given} cannot be locked ({error}): start nothing else that writes there")
