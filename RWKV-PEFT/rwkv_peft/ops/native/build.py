"""Compile a C++ source into a shared library, once: cached by content, safe when several processes build at once.

A library's file name carries two hashes: of sources and flags, and of the compiler and its version. If either changes,
it is built anew, so that nothing stale is loaded. Where no compiler works, a library that was made earlier of the same
sources and flags serves.
"""

import errno
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .kept import cache_directory, is_whole, make_once
from .library import BuildError


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
    """The library of `source`, compiled with flags -> its path. headers: files whose content matters besides the
    source's; cache: a folder, by default cache_directory(). Raises BuildError with the compiler's own words if it
    fails; a failure leaves nothing behind."""
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
    """Compile in the folder `work` -> the library's path. Raises BuildError with the compiler's words, or OSError if
    they say that the disk is full, which may be that of temporary files."""
    environment = os.environ | {"LC_ALL": "C"}  # the message that is looked for below is English
    command = [*command, "-o", "library.so"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, env=environment)
    if done.returncode != 0 and "No space left on device" in done.stdout + done.stderr:
        raise OSError(errno.ENOSPC, "the disk is full, there or in TMPDIR")
    if done.returncode != 0:
        raise BuildError(f"the compiler failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    return work / "library.so"
