"""Compile a native source into a shared library, once: cached by content, safe when several processes build at once.

A library's file name carries two hashes: of its recipe (sources and flags), and of the compilers and their versions. If
either changes, it is built anew, so that nothing stale is loaded. If the machine has no compiler, a library that was
made earlier by the same recipe serves (kept_library).
"""

import errno
import functools
import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .kept import cache_directory, is_whole, make_once
from .library import BuildError


@dataclass(frozen=True)
class Recipe:
    """The making of a library: `compile` (compiler and flags) turns `source` into an object, and `link` (linker
    and flags) that into a library. headers: files whose content matters besides the source's."""

    source: Path
    compile: tuple[str, ...]
    link: tuple[str, ...]
    headers: Sequence[str | Path] = ()

    @property
    def files(self) -> list[Path]:
        return [self.source, *map(Path, self.headers)]

    def digest(self) -> str:
        """A hash of sources and flags, without compilers and folders (-I): another checkout's build serves."""
        flags = [flag for flag in self.compile[1:] if not flag.startswith("-I")]
        digest = hashlib.sha256("\0".join((self.source.name, *flags, "\n")).encode())
        digest.update("\0".join(self.link[1:]).encode())
        for path in self.files:
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def build_library(name: str, recipe: Recipe, cache: str | Path | None = None) -> Path:
    """Make a library by its recipe -> its path. cache: a folder, by default cache_directory(). Raises BuildError with
    the compiler's own words if it fails; a failure leaves nothing behind."""
    if missing := [str(path) for path in recipe.files if not path.is_file()]:
        raise BuildError(f"the sources of {name} are missing: {', '.join(missing)}; reinstall, or clone the repository")
    cache = Path(cache or cache_directory())
    library = cache / f"{name}-{recipe.digest()}-{_compilers(recipe)}.so"
    try:
        make_once(library, name, lambda work: _make(work, recipe))
    except OSError as error:
        raise BuildError(
            f"cannot build {name} in {cache}: {error.strerror or error}; make that folder writable, or point "
            "XDG_CACHE_HOME elsewhere"
        ) from error
    return library


def kept_library(name: str, recipe: Recipe, cache: Path | None = None) -> Path | None:
    """The library that any compiler made earlier by this recipe, or None."""
    found = (cache or cache_directory()).glob(f"{name}-{recipe.digest()}-*.so")
    return next(filter(is_whole, sorted(found)), None)


def _compilers(recipe: Recipe) -> str:
    """A hash of the compilers by path and version."""
    digest = hashlib.sha256()
    for program in sorted({recipe.link[0], recipe.compile[0]}):
        digest.update(program.encode() + _version(program))
    return digest.hexdigest()[:8]


@functools.cache  # a run asks for several libraries
def _version(compiler: str) -> bytes:
    """Return the text of a compiler's version. Raises BuildError if it does not run."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"cannot run the compiler {compiler}: {error}; install a working one") from error


def _make(work: Path, recipe: Recipe) -> Path:
    """Compile and link in the folder `work` -> the library's path. Raises BuildError with the compiler's words, or
    OSError if they say that the disk is full, which may be that of temporary files."""
    environment = os.environ | {"LC_ALL": "C"}  # the message that is looked for below is English
    compiling = (*recipe.compile, "-c", str(recipe.source), "-o", "0.o")
    for command in (compiling, (*recipe.link, "0.o", "-o", "library.so")):
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, env=environment)
        if done.returncode != 0 and "No space left on device" in done.stdout + done.stderr:
            raise OSError(errno.ENOSPC, "the disk is full, there or in TMPDIR")
        if done.returncode != 0:
            raise BuildError(f"the compiler failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    return work / "library.so"
