"""Writes files atomically: a reader gets the old file or the whole new one, and no input is overwritten.

A temporary file is called `.NAME.HOST-PID-TOKEN.tmp`, after the process that writes it. The next writer in the folder
removes the leftovers of processes that are gone.
"""

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..cli.errors import UserError, encoded
from .readable import home_meant


class CannotWrite(UserError):
    """A file cannot be written; the message gives the reason."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on success it is fsynced and renamed to `path`.

    The folder is made if it is missing. If the body raises, the temporary file and a folder that was made for it are
    removed, and the old file at `path` stays as it was. A link at `path` is followed. Raises CannotWrite if the file
    cannot be written.
    """
    path = _real(path, f"cannot write {path}")
    with temporary_beside(path) as temporary:
        mode = temporary.stat().st_mode & 0o777  # the umask's
        with suppress(FileNotFoundError):
            mode &= path.stat().st_mode | 0o700  # a file that others could not read stays so
        yield temporary
        temporary.chmod(mode)  # a library may have made the file anew, for the owner alone
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as atomic_write does, `encoded`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded(text))


def append_text(path: str | Path, text: str) -> None:
    """Append a text to a file, `encoded`."""
    with open(path, "ab") as file:
        file.write(encoded(text))


def check_output(flag: str, path: str | Path, inputs: Iterable[tuple[str, str | Path | None]]) -> None:
    """Raise UserError if writing `path`, given as `flag`, would overwrite an input or is impossible; leave nothing
    behind.

    inputs are (flag, path) pairs of files and folders that are read; the path is None if the flag is not given.
    """
    for name, source in inputs:
        files = () if source is None else Path(source).iterdir() if os.path.isdir(source) else (source,)
        if any(same_file(file, path) for file in files):
            raise UserError(
                f"{flag} {path} is the file given as {name}, which must not be overwritten; choose another name"
            )
    with temporary_beside(_real(path, f"{flag} {path}")):
        pass


def _real(path: str | Path, given: str) -> Path:
    """A path without links. Raises UserError, with `given` in front, for a path that would make a folder called ~, and
    for one with NUL, which a chat can be given."""
    if "\0" in str(path):
        raise UserError(f"{given}: a name holds no NUL; leave it out")
    if meant := home_meant(path):
        raise UserError(f"{given}: {meant}")
    return Path(os.path.realpath(path))


@contextmanager
def without_empty_folders(folder: Path) -> Iterator[None]:
    """On exit, remove `folder` and those above it if they were missing on entry and are empty."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]  # the innermost first
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def same_file(left: str | Path, right: str | Path) -> bool:
    """True if two paths, which need not exist, lead to one file."""
    return os.path.exists(left) and os.path.exists(right) and os.path.samefile(left, right)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new empty folder among the system's temporary ones, and remove it; failures to write are UserErrors."""
    place = Path(tempfile.gettempdir()) / "rwkv_peft"
    with temporary_beside(place, folder=True, remedy="TMPDIR names another folder") as folder:
        yield folder


@contextmanager
def temporary_beside(path: Path, folder: bool = False, remedy: str = "nothing was changed there") -> Iterator[Path]:
    """Yield a new empty file, or folder, beside `path`, and remove it afterwards. The folder around it is made if it is
    missing, and removed again if it stays empty. Failures to write become CannotWrite, which ends in `remedy`."""
    with telling_failures(path, remedy), without_empty_folders(path.parent):
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder; give the name of the file to write")
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(
                f"{path} is a device or a pipe, which cannot be replaced; give the name of the file to write"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        temporary = path.with_name(f".{path.name}.{place()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        temporary.mkdir(mode=0o700) if folder else temporary.touch(exist_ok=False)
        try:
            yield temporary
        finally:
            _remove(temporary)


@contextmanager
def telling_failures(path: Path, remedy: str) -> Iterator[None]:
    """Turn a failure to write `path` into a CannotWrite that ends in `remedy`."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error, path)
        if reason is None:
            raise
        raise CannotWrite(f"cannot write {path}: {reason}; {remedy}") from error


def place() -> str:
    """A short name for this host, or this container, because another's process numbers mean other processes."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def remove_leftovers(folder: Path) -> None:
    """Remove a folder's temporary files and folders that belong to processes of this host that are gone."""
    for file in folder.glob(f".*.{place()}-*.tmp"):
        if (match := re.search(r"-([0-9]{1,9})-[0-9a-f]{8}\.tmp$", file.name)) and not is_alive(int(match[1])):
            with suppress(PermissionError, FileNotFoundError):  # another user's, or another writer is removing it too
                _remove(file)


def _remove(temporary: Path) -> None:
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """True if there is a process of this number on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def fsync(path: Path) -> None:
    """Make a file's content durable, or a folder's names: new files in it, and renames."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_failure(error: Exception, path: Path) -> str | None:
    """The reason why writing `path` failed, or None if `error` does not come from the system.

    torch and safetensors report the system's errors as their own exception types, so the text is searched too.
    """
    text = str(error)
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"os error (\d+)", text)):
        number = int(match[1])
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return "the disk is full; free some space or choose another disk"
    # the messages of torch and numpy for a short write, which give no reason
    if re.search("file write failed|unexpected pos|requested and .* written", text):
        return "the disk refused the data (is it full?)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write there ({os.strerror(number).lower()}); choose another folder"
    if number in (errno.ENOTDIR, errno.EEXIST):
        return f"a file stands where {path.parent} or a folder above it should be; choose another folder"
    if number is not None:
        other = getattr(error, "filename", None)  # perhaps another file: an input that became unreadable
        if not isinstance(other, (str, bytes, os.PathLike)) or Path(os.fsdecode(other)).parent == path.parent:
            return os.strerror(number).lower()
        return f"{os.strerror(number).lower()} ({os.fsdecode(other)})"
    return text.lower() if isinstance(error, OSError) else None


def room_at(path: str | Path) -> int:
    """The bytes free for this user on the disk of `path`, which need not exist yet."""
    place = Path(os.path.realpath(path))
    disk = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists()))
    return disk.free if disk.total else sys.maxsize  # some file systems give no numbers


def require_room(flag: str, path: str | Path, needed: int, what: str = "") -> None:
    """Raise UserError if the disk of `path`, given as `flag`, has fewer bytes free than are needed for `what`."""
    if (free := room_at(path)) < needed:
        raise UserError(
            f"{flag} {path} needs {needed:,} bytes{what and f' for {what}'}, and its disk has {free:,} free; free some "
            "space or choose another disk"
        )
