"""Files that are made once and kept in the user's cache, and used only where they are whole.

Each ends in a seal, the SHA-256 of what stands before it: a library that a full disk or a copy has cut short would
otherwise end the process when its missing pages are touched. The loaders of libraries look at what their headers name,
and not behind it.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from .errors import BuildError

COMPILING = logging.getLogger("rwkv_peft.compiling")  # hears of what is made, in words for the user
SEAL = hashlib.sha256().digest_size  # bytes


def cache_directory() -> Path:
    """Where they are kept: rwkv_peft under the user's cache folder (XDG base directory rules). Raises BuildError for a
    user without a home folder, as containers have them."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "rwkv_peft"
    except RuntimeError as error:
        raise BuildError("this user has no home folder to keep kernels in; point XDG_CACHE_HOME at one") from error


def make_once(path: Path, name: str, make: Callable[[Path], Path]) -> None:
    """Have the file `path` made where it is missing or not whole, sealed, and appear at once; make(folder) makes it in
    an empty folder and returns where.

    Of the processes that want a file called `name` in that cache one makes it, and the others wait. What one left that
    was killed meanwhile is removed. Raises OSError where the cache cannot be written.
    """
    if is_whole(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f"{name}.lock"):
        if is_whole(path):  # another process has made it while this one waited
            return
        COMPILING.info("compiling %s, once for this machine", name)
        work = path.parent / f"{name}.build"  # of whoever holds the lock
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        try:
            finished = make(work)
            with open(finished, "ab") as file:
                file.write(_seal(finished.read_bytes()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(finished, path)
        finally:
            shutil.rmtree(work)


def is_whole(path: Path) -> bool:
    """Whether there is a file at `path`, and it is as it was made."""
    if not path.is_file():  # a pipe would be waited for
        return False
    content = path.read_bytes()
    return content[-SEAL:] == _seal(content[:-SEAL])


def content_of(path: Path) -> bytes:
    """The bytes of a file that is whole, without its seal."""
    return path.read_bytes()[:-SEAL]


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
