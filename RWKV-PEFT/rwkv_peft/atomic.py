"""Writing a file so that a reader sees the old one or the whole new one, never a part."""

import errno
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def atomic_write(path):
    """Yield a temporary path in `path`'s folder; on success it is fsynced and renamed to `path`.

    The folder is made if it is missing. When the body raises, the temporary file is removed and
    whatever stood at `path` before stays as it was. A link at `path` is followed.

    Raises UserError: the disk is full, the folder cannot be written, `path` is a folder.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of the file to write")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & 0o777  # what the user's umask grants
        yield temporary
        temporary.chmod(mode)  # a writer may have made the file anew, for the owner alone
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except Exception as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}; nothing was changed there") from error
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _fsync_folder(folder):
    """Make the rename itself durable, where the system can open a folder (Windows cannot)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_failure(error):
    """Why a write failed, in words, or None when `error` is not about the disk.

    torch and safetensors report a full disk as their own exception types, so the text counts too.
    """
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    text = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
        return "the disk is full; free some space or choose another disk"
    # torch's and numpy's words for a short write, which do not say why
    if "file write failed" in text or ("requested and" in text and "written" in text):
        return "the disk refused the data (is it full?)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission to write there; choose another folder"
    if number in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return os.strerror(number).lower()
    return None
