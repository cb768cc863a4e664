"""Compile kernels' sources into libraries and other files, once: cached by content, safe when several processes build.

A library's file name carries two hashes: of sources and flags, and of the compiler and its version. If either changes,
it is built anew, so that nothing stale is loaded. Where no compiler works, a library that was made earlier of the same
sources and flags serves.

Each cached file ends in a seal, the SHA-256 of the rest: otherwise a library that a full disk or a copy has cut short
would be loaded, and end the process when a missing page is touched. Loaders of libraries ignore bytes after the parts
that the header names, such as the seal.
"""

import ctypes
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...cli.names import user_cache

Declaration = tuple[Any, ...]  # a C function's: (name, result type or None, *argument types)


class BuildError(RuntimeError):
    """A library could not be built or loaded; the message has the reason and the remedy."""


def load(path: str | Path, *functions: Declaration) -> ctypes.CDLL:
    """Load the library at `path` and declare its C functions, each a Declaration, in which a structure's class stands
    for a pointer to it. Raises BuildError if it cannot be loaded."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete that file so that it is built anew") from error
    for name, result, *arguments in functions:
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [ctypes.POINTER(kind) if issubclass(kind, ctypes.Structure) else kind for kind in arguments]
    return library


INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def source_directory(kind: str) -> Path:
    """The folder of the "cpu" or the "cuda" sources: in the package (in the repository a link), or beside it."""
    package = Path(__file__).resolve().parents[2]
    installed = package / kind
    return installed if installed.is_dir() else package.parents[1] / kind


def included_files(source: str | Path, root: str | Path) -> list[Path]:
    """Every file that `source` includes in quotes, directly or through others; names are relative to the folder `root`.

    Includes in branches that a compiler would skip count too. Raises BuildError if a file is missing.
    """
    found: set[Path] = set()
    waiting = [Path(source)]
    while waiting:
        path = waiting.pop()
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BuildError(
                f"the kernels' source {path} is missing: {error}; reinstall, or clone the repository"
            ) from error
        new = {Path(root) / name for name in INCLUDE.findall(text)} - found
        found |= new
        waiting += new
    return sorted(found)


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


def find_compiler() -> str:
    """The path of a C++ compiler; BuildError if there is none."""
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError(
        "no g++ or clang++ on this machine's PATH; install one (Debian, Ubuntu: apt install g++), or take "
        "backend='reference'"
    )


def compiler_knows(flags: Sequence[str]) -> bool:
    """True if the C++ compiler takes these flags, or if there is none, because a library may be in the cache."""
    try:
        command = [find_compiler(), *flags, "-E", "-x", "c++", "/dev/null"]
    except BuildError:
        return True
    return subprocess.run(command, capture_output=True).returncode == 0


def build_library(
    name: str, source: Path, flags: Sequence[str], headers: Sequence[str | Path] = (), cache: str | Path | None = None
) -> Path:
    """The library of `source`, compiled with flags -> its path. headers: further files that the library depends on;
    cache: a folder, by default cache_directory(). Raises BuildError with the compiler's own words if it fails; a
    failure leaves nothing behind."""
    files = [source, *map(Path, headers)]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise BuildError(f"the sources of {name} are missing: {', '.join(missing)}; reinstall, or clone the repository")
    cache = Path(cache or cache_directory())
    stem = f"{name}-{_digest(files, flags)}-"
    try:
        compiler = find_compiler()
        library = cache / f"{stem}{_version(compiler)}.so"
        make_once(library, name, lambda work: _make(work, [compiler, *flags, "-shared", str(source)]))
    except BuildError:
        kept = next(filter(is_whole, sorted(cache.glob(f"{stem}*.so"))), None)
        if kept is None:
            raise
        return kept
    except OSError as error:
        raise BuildError(
            f"cannot build {name} in {cache}: {error.strerror or error}; make that folder writable, or point "
            "XDG_CACHE_HOME elsewhere"
        ) from error
    return library


def _digest(files: Sequence[Path], flags: Sequence[str]) -> str:
    """A hash of sources and flags, without folders (-I): another checkout's build serves."""
    digest = hashlib.sha256("\0".join((files[0].name, *(flag for flag in flags if flag[:2] != "-I"))).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache  # a run asks for several libraries
def _version(compiler: str) -> str:
    """A hash of a compiler's path and version. Raises BuildError if it does not run."""
    try:
        told = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"cannot run the compiler {compiler}: {error}; install a working one") from error
    return hashlib.sha256(compiler.encode() + told).hexdigest()[:8]


def _make(work: Path, command: Sequence[str]) -> Path:
    """Compile in the folder `work` -> the library's path. Raises BuildError with the compiler's words, or OSError if a
    disk is full, perhaps the one for temporary files."""
    environment = os.environ | {"LC_ALL": "C"}  # the message that is looked for below is English
    command = [*command, "-o", "library.so"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, env=environment)
    if done.returncode != 0 and "No space left on device" in done.stdout + done.stderr:
        raise OSError(errno.ENOSPC, "the disk is full, there or in TMPDIR")
    if done.returncode != 0:
        raise BuildError(f"the compiler failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    return work / "library.so"
