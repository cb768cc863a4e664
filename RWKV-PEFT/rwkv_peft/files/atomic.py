"""Writing a file so that a reader sees the old one or the whole new one, never a part, and never over an input.

A temporary file is called `.NAME.PLACE-PID-TOKEN.tmp`: PLACE stands for the machine and, in a container, its own count
of processes, PID for the process that writes it. One whose process is gone is removed by the next writer in its folder;
in a folder that several machines share, each knows of its own processes alone and leaves the others' files. A name says
so everywhere, where a lock depends on the file system, and is lost when a writer makes the file anew.
"""

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .readable import home_meant

TRIES = 100  # at what another process undoes in the same moment


class CannotWrite(UserError):
    """What keeps a file from being written."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on success it is fsynced and renamed to `path`.

    The folder is made if it is missing. When the body raises, the temporary file is removed, so is a folder that was
    made for it, and whatever stood at `path` before stays as it was. A link at `path` is followed.

    Raises UserError for whatever keeps the file from being written: a full disk, a folder that cannot be written or
    made, a name that is too long or that of a folder or device.
    """
    path = _real(path, f"cannot write {path}")
    with temporary_beside(path) as temporary:
        mode = temporary.stat().st_mode & 0o777  # what the user's umask grants
        yield temporary
        temporary.chmod(mode)  # a writer may have made the file anew, for the owner alone
        _fsync(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)


def check_output(flag: str, path: str | Path, inputs: Iterable[tuple[str, str | Path | None]]) -> None:
    """Raise UserError where writing `path`, given as `flag`, would overwrite an input or is not possible; nothing
    stays.

    inputs are (flag, path) pairs of files and folders that are read, with None as the path where a flag is not given.
    """
    for name, source in inputs:
        if any(same_file(file, path) for file in _files_of(source)):
            raise UserError(
                f"{flag} {path} is the file given as {name}, which must not be overwritten; choose another name"
            )
    for folder in Path(path).parents:
        if folder.name == ".." and not os.path.exists(folder):  # which the system does not leave out, as realpath does
            raise UserError(f"{flag} {path}: there is no folder {folder.parent}; leave it and the .. behind it out")
    with temporary_beside(_real(path, f"{flag} {path}")):
        pass


def _real(path: str | Path, given: str) -> Path:
    """Where a path leads. Raises UserError, about what was given, for one that would make a folder called ~, and for
    one that no system takes."""
    if "\0" in str(path):
        raise UserError(f"{given}: a name holds no NUL; leave it out")
    if meant := home_meant(path):
        raise UserError(f"{given}: {meant}")
    return Path(os.path.realpath(path))


@contextmanager
def without_empty_folders(folder: Path) -> Iterator[None]:
    """Afterwards `folder` and those above it that were missing are removed again where nothing lies in them."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]  # the innermost first
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # something lies in it, of another process it may be, or one of those removed it
                path.rmdir()


def _files_of(source: str | Path | None) -> Sequence[str | Path]:
    if source is None:
        return []
    return sorted(Path(source).iterdir()) if os.path.isdir(source) else [source]


def same_file(left: str | Path, right: str | Path) -> bool:
    """Whether two paths, which need not exist, lead to one file."""
    return os.path.exists(left) and os.path.exists(right) and os.path.samefile(left, right)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new empty folder among the system's temporary ones, which is removed afterwards; failures to write become
    UserErrors."""
    try:
        place = tempfile.gettempdir()
    except OSError as error:
        raise UserError(f"no temporary folder can be written: {error}; name one by TMPDIR") from error
    with temporary_beside(Path(place) / "rwkv_peft", folder=True, remedy="TMPDIR names another folder") as folder:
        yield folder


@contextmanager
def temporary_beside(path: Path, folder: bool = False, remedy: str = "nothing was changed there") -> Iterator[Path]:
    """Yield a new empty file, or folder, in the folder of `path`, which is removed afterwards, as is that folder where
    it is made for this and nothing comes into it; failures to write become UserErrors that end in `remedy`."""
    with telling_failures(path, remedy), without_empty_folders(path.parent):
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder; give the name of the file to write")
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(
                f"{path} is a device or a pipe, which cannot be replaced; give the name of the file to write"
            )
        temporary = path.with_name(f".{path.name}.{place()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        _make(temporary, folder)
        try:
            remove_leftovers(path.parent)
            yield temporary
        finally:
            _remove(temporary)


def _make(temporary: Path, folder: bool) -> None:
    """Make a new empty file, or folder, and the folders above it that are missing. Those are empty for a moment, in
    which another process may remove them (without_empty_folders)."""
    for tries_left in reversed(range(TRIES)):
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(mode=0o700) if folder else temporary.touch(exist_ok=False)
            return
        except (FileNotFoundError, FileExistsError):
            if not tries_left:
                raise


@contextmanager
def telling_failures(path: Path, remedy: str) -> Iterator[None]:
    """Make a CannotWrite, which ends in `remedy`, of what keeps `path` from being written."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error, path)
        if reason is None:
            raise
        raise CannotWrite(f"cannot write {path}: {reason}; {remedy}") from error


def place() -> str:
    """A short name for where process numbers count: this machine, or this container on it."""
    identity = [platform.node()]
    for source in (Path("/etc/machine-id"), Path("/proc/self/ns/pid")):
        try:
            identity.append(os.readlink(source) if source.is_symlink() else source.read_text())
        except OSError:  # other systems have neither, and their names tell them apart
            identity.append("")
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:8]


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in a folder whose process, of this place, is gone."""
    if os.name == "nt":  # where asking for a process ends it
        return
    for file in folder.glob(f".*.{place()}-*.tmp"):
        if (match := re.search(r"-([0-9]{1,9})-[0-9a-f]{8}\.tmp$", file.name)) and not is_alive(int(match[1])):
            try:
                _remove(file)
            except (PermissionError, FileNotFoundError):  # another user's; or another writer is removing it as well
                continue


def _remove(temporary: Path) -> None:
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number here."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _fsync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make what was renamed and made in a folder durable, where the system can open a folder (Windows cannot)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_failure(error: Exception, path: Path) -> str | None:
    """Why writing `path` failed, in words, or None when `error` does not come from the system.

    torch and safetensors report the system's refusals as their own exception types, so the text counts too.
    """
    text = str(error)
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number is None and (told := re.search(r"os error (\d+)", text)):
        number = int(told[1])
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return "the disk is full; free some space or choose another disk"
    # torch's and numpy's words for a short write, which do not say why
    if re.search("file write failed|unexpected pos|requested and .* written", text):
        return "the disk refused the data (is it full?)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write there ({os.strerror(number).lower()}); choose another folder"
    if number in (errno.ENOTDIR, errno.EEXIST):
        return f"a file stands where {path.parent} or a folder above it should be; choose another folder"
    if number is not None:
        other = getattr(error, "filename", None)  # of another file, it may be an input that became unreadable
        if not isinstance(other, (str, bytes, os.PathLike)) or Path(os.fsdecode(other)).parent == path.parent:
            return os.strerror(number).lower()
        return f"{os.strerror(number).lower()} ({os.fsdecode(other)})"
    return text.lower() if isinstance(error, OSError) else None
