"""Locks: a file that one process holds at a time and that names its holder, which lets one run use a folder and one
process write a file. The system releases it when the process ends, however it ends."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from ..cli.errors import UNREADABLE, NotNow, told
from .atomic import check_output, telling_failures, without_empty_folders
from .readable import object_of

LONGEST = 1000  # bytes that a holder writes about itself
LEFT = 0.1  # seconds in which a holder may let go
ASKED = 30.0  # seconds in which `holder` does, which shares a lock for a moment, or longer on a busy machine
LOCK = ".run.lock"
OTHERS = "by another user, it seems; if not, remove {}"


class Busy(Exception):
    """Another process holds the file; the text says which, where, and since when."""


class NoLocks(Exception):
    """The file system has no locks; the text is its error."""


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Make the lock file `path` in an existing folder, hold it, and remove it afterwards. Raises Busy if another
    process holds it, NoLocks if the file system has none, OSError if the file cannot be made."""
    with _locked(path) as file:
        try:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            if file.writable():
                file.truncate()
                file.write(json.dumps({"host": platform.node(), "process": os.getpid(), "since": now}).encode())
            yield
        finally:
            with suppress(OSError):  # a folder that is read-only by now must not hide the body's own exception
                path.unlink()  # while it is held, so that whoever has opened it sees that it is gone (_is_at)


def _locked(path: Path) -> FileIO:
    """The file at `path`, made if it is missing, open and locked."""
    began = time.monotonic()
    while True:
        file = _opened(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                if time.monotonic() > began + (LEFT if _is_held(file) else ASKED):
                    raise Busy(_holder(file)) from None
            time.sleep(0.005)
            continue
        except OSError as error:
            with file:
                if not file.writable():  # NFS takes no lock of one that is opened to be read
                    raise Busy(OTHERS.format(path)) from None
            with suppress(OSError):
                path.unlink()
            raise NoLocks(str(error)) from None
        except BaseException:
            file.close()
            raise
        if _is_at(file, path):
            return file
        file.close()  # its holder removed it after it was opened here


def _opened(path: Path) -> FileIO:
    """Open the file at `path`, made if it is missing; another user's, who can be locked out all the same, to be read.
    Raises Busy if that user lets nobody read it. No link is followed, because the text would be written elsewhere."""
    try:
        return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except PermissionError:
        if not os.path.lexists(path):
            raise
    try:
        return FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "r")
    except PermissionError:
        raise Busy(OTHERS.format(path)) from None


def _is_held(file: FileIO) -> bool:
    """Tell whether a process holds a lock alone, rather than shares it."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _holder(file: FileIO) -> str:
    """The file's holder, as it described itself in the file."""
    try:
        values = json.loads(file.read(LONGEST))
        return f"process {values['process']} on {values['host']}, since {values['since']}"
    except UNREADABLE as error:  # it has not written yet
        return f"another process, which does not say who it is ({told(error)})"


def holder(path: Path) -> dict[str, Any] | None:
    """Return what the process that holds a lock file says of itself (host, process, since), {} if it says nothing; None
    if no process holds it."""
    try:
        file = FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "r")  # a pipe would be waited for
    except OSError:
        return None
    with file:
        if not _is_held(file):
            return None
        return object_of(file.read(LONGEST))


@contextmanager
def alone_in(folder: Path, say: Callable[..., object] = print, flag: str = "--proj_dir") -> Iterator[None]:
    """Lock a run's folder, given as `flag`; make it if it is missing, and remove it again if it stays empty. Raises
    UserError if it cannot be written, NotNow if another process holds it; if the file system has no locks, `say` tells
    so and the run goes on."""
    real = Path(os.path.realpath(folder))  # mkdir fails on a link whose target does not exist yet
    with without_empty_folders(real), ExitStack() as stack:
        check_output(flag, folder / "checkpoints" / "state.json", [])
        real.mkdir(parents=True, exist_ok=True)
        enter(stack, folder / LOCK, f"{flag} {folder}", "a run is training there", "another folder", say)
        yield


@contextmanager
def alone_at(path: Path, say: Callable[..., object] = print) -> Iterator[None]:
    """Be the only process that writes a file, given as --output, by a lock beside it; make its folder if it is missing,
    and remove that again if it stays empty. Raises NotNow if another process holds the lock; if the file system has
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
        with telling_failures(lock, f"name {instead}"):
            stack.enter_context(hold(lock))
    except Busy as error:
        raise NotNow(f"{given}: {busy} ({error}); wait for it, or name {instead}") from None
    except NoLocks as error:
        say(f"output    {given} cannot be locked ({error}): start nothing else that writes there")
