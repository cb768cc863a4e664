"""Files that are made once and kept in the user's cache, and used only if they are whole.

Each file ends in a seal, the SHA-256 of the rest: otherwise a library that a full disk or a copy has cut short would be
loaded, and end the process when a missing page is touched. Loaders of libraries ignore bytes after the parts that the
header names, such as the seal.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ...names import user_cache
from .library import BuildError

COMPILING = logging.getLogger("rwkv_peft.compiling")  # says what is compiled, in words for the user
SEAL = hashlib.sha256().digest_size  # bytes


def cache_directory() -> Path:
    """The folder of these files. Raises BuildError for a user without a home folder."""
    folder = user_cache()
    if folder is None:
        raise BuildError("this user has no home folder to keep kernels in; point XDG_CACHE_HOME at one")
    return folder


def make_once(path: Path, name: str, make: Callable[[Path], Path]) -> None:
    """Make the file `path`, sealed, if it is missing or not whole; it appears only when it is complete. make(folder)
    makes it in an empty folder and returns its path.

    If several processes want a file called `name` in that cache, one makes it, and the others wait. Remains of a killed
    process are removed. Raises OSError if the cache cannot be written.
    """
    if is_whole(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f"{name}.lock"):
        if is_whole(path):  # another process has made it while this one waited
            return
        COMPILING.info("compiling %s, once for this machine", name)
        work = path.parent / f"{name}.build"  # for the holder of the lock
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
    """True if there is a file at `path`, unchanged since it was sealed."""
    if not path.is_file():  # reading a pipe would block
        return False
    content = path.read_bytes()
    return content[-SEAL:] == _seal(content[:-SEAL])


def content_of(path: Path) -> bytes:
    """The bytes of a file that is whole, without its seal."""
    return path.read_bytes()[:-SEAL]


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
