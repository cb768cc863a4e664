"""Compile kernels' sources into libraries and other files, once: cached by content, safe when several processes build.

A file's name carries a hash of its sources and flags, so that nothing stale is loaded; it appears only when it is
whole.
"""

import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...cli.installing import COMPILER
from ...cli.names import user_cache
from ...system import others_may_write

Declaration = tuple[Any, ...]  # a C function's: (name, result type or None, *argument types)
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
COMPILING = logging.getLogger("rwkv_peft.compiling")  # a run prints its messages


class BuildError(RuntimeError):
    """A library could not be built or loaded; the message has the reason and the remedy."""


def load(path: str | Path, *functions: Declaration) -> ctypes.CDLL:
    """The library at `path` with its C functions declared; in a Declaration a structure's class stands for a pointer to
    it. Raises BuildError if it cannot be loaded."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete that file so that it is built anew") from error
    for name, result, *arguments in functions:
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [ctypes.POINTER(kind) if issubclass(kind, ctypes.Structure) else kind for kind in arguments]
    return library


def source_directory(kind: str) -> Path:
    """The folder of the "cpu" or the "cuda" sources: in the package (in the repository a link), or beside it."""
    package = Path(__file__).resolve().parents[2]
    installed = package / kind
    return installed if installed.is_dir() else package.parents[1] / kind


def included_files(source: str | Path, root: str | Path) -> list[Path]:
    """Every file that `source` includes in quotes, directly or through others; names are relative to the folder `root`.

    Includes in branches that a compiler would skip count too. Raises BuildError if a file is missing.
    """
    included: set[Path] = set()
    waiting = [Path(source)]
    while waiting:
        path = waiting.pop()
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BuildError(
                f"the kernels' source {path} is missing: {error}; reinstall, or clone the repository"
            ) from error
        new = {Path(root) / name for name in INCLUDE.findall(text)} - included
        included |= new
        waiting += new
    return sorted(included)


def content_hash(words: Iterable[str], files: Iterable[Path]) -> str:
    """16 hex digits of the SHA-256 of some words, such as a compiler's flags, and of files' contents."""
    digest = hashlib.sha256("\0".join(words).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_directory() -> Path:
    """The folder of these files, which are programs. Raises BuildError for a user without a home folder, and for a
    folder that another user owns or all may write into."""
    folder = user_cache()
    if folder is None:
        raise BuildError("this user has no home folder to keep kernels in; point XDG_CACHE_HOME at one")
    with suppress(FileNotFoundError):
        if others_may_write(folder):
            raise BuildError(
                f"other users may put files into {folder}, which would run as you; take their right to write from it, "
                "or point XDG_CACHE_HOME at a folder of your own"
            )
    return folder


def make_once(path: Path, name: str, make: Callable[[Path], Path]) -> Path:
    """Make the file `path` if it is missing -> path. make(folder) makes it in an empty folder and returns its path.

    If several processes want a file called `name` in that cache, one makes it, and the others wait. Remains of a killed
    process are removed. Raises BuildError if the cache cannot be written.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.parent / f"{name}.lock"):
            if not path.is_file():  # else another process has made it while this one waited
                COMPILING.info("compiling %s, once for this machine", name)
                work = path.parent / f"{name}.build"  # for the holder of the lock
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                try:
                    finished = make(work)
                    with open(finished, "rb+") as file:
                        os.fsync(file.fileno())
                    os.replace(finished, path)
                finally:
                    shutil.rmtree(work)
    except OSError as error:
        raise BuildError(
            f"cannot build {name} in {path.parent}: {error.strerror or error}; make that folder writable, or point "
            "XDG_CACHE_HOME elsewhere"
        ) from error
    return path


def find_compiler() -> str:
    """The path of a C++ compiler; BuildError if there is none."""
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError(f"no g++ or clang++ on this machine's PATH; install one ({COMPILER}), or take backend='reference'")


def compiler_knows(flags: Sequence[str]) -> bool:
    """True if the C++ compiler takes these flags, or if there is none, because a library may be in the cache."""
    try:
        command = [find_compiler(), *flags, "-E", "-x", "c++", "/dev/null"]
    except BuildError:
        return True
    return subprocess.run(command, capture_output=True).returncode == 0


def build_library(
    name: str, source: Path, flags: Sequence[str], headers: Sequence[Path] = (), cache: Path | None = None
) -> Path:
    """The library of `source`, compiled with flags -> its path. headers: further files that it depends on; cache: a
    folder, by default cache_directory(). Raises BuildError with the compiler's message if that fails."""
    # without folders (-I), so that another checkout's build serves, and a compiler's version: an older build is as good
    words = (source.name, *(flag for flag in flags if flag[:2] != "-I"))
    library = (cache or cache_directory()) / f"{name}-{content_hash(words, (source, *headers))}.so"

    def make(work: Path) -> Path:
        command = [find_compiler(), *flags, "-shared", str(source), "-o", "library.so"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"the compiler failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
        return work / "library.so"

    return make_once(library, name, make)
