"""Files that are made once and kept in the user's cache, and used only if they are whole.

Each file ends in a seal, the SHA-256 of the rest: otherwise a library that a full disk or a copy has cut short would be
loaded, and end the process when a missing page is touched. Loaders of libraries ignore bytes after the parts that the
header names, such as the seal.
"""

import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from ...cli.names import user_cache
from .library import BuildError

COMPILING = logging.getLogger("rwkv_peft.compiling")  # says what is compiled, in words for the user
SEAL = hashlib.sha256().digest_size  # bytes


def cache_directory() -> Path:
    """The folder of these files, which are programs. Raises BuildError for a user without a home folder, and for a
    folder that another user owns or all may write into."""
    folder = user_cache()
    if folder is None:
        raise BuildError("this user has no home folder to keep kernels in; point XDG_CACHE_HOME at one")
    with suppress(FileNotFoundError):
        now = folder.stat()
        if os.geteuid() not in (0, now.st_uid) and now.st_uid != 0 or now.st_mode & stat.S_IWOTH:
            raise BuildError(
                f"other users may put files into {folder}, which would run as you; take their right to write from it, "
                "or point XDG_CACHE_HOME at a folder of your own"
            )
    return folder


def make_once(path: Path, name: str, make: Callable[[Path], Path]) -> None:
    """Make the file `path`, sealed, if it is missing or not whole; it appears only when it is complete. make(folder)
    makes it in an empty folder and returns its path.

    If several processes want a file called `name` in that cache, one makes it, and the others wait. Remains of a killed
    process are removed. Raises OSError if the cache cannot be written.
    """
    if is_whole(path):
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
