"""Compile native sources into a shared library, once: cached by content, safe when several processes build at once.

A library's file name carries two hashes: of its recipe (sources and flags), and of the compilers and their versions. If
either changes, it is built anew, so that nothing stale is loaded. If the machine has no compiler, a library that was
made earlier by the same recipe serves (kept_library).
"""

import errno
import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ...children import python_command
from .compilers import find_program
from .kept import cache_directory, is_whole, make_once
from .library import BuildError


@dataclass(frozen=True)
class Unit:
    """One compilation: `command` (compiler and flags) turns `source` into an object file."""

    source: Path
    command: tuple[str, ...]


def build_library(
    name: str,
    units: Sequence[Unit],
    link_command: Sequence[str],
    headers: Sequence[str | Path] = (),
    cache: str | Path | None = None,
) -> Path:
    """Compile `units`, link their objects with `link_command` (linker and flags), and return the library's path.

    headers: files whose content matters besides the units' sources. cache: a folder, by default cache_directory().
    Raises BuildError with the compiler's own words if it fails; a failure leaves nothing behind.
    """
    missing = [str(path) for path in (*(unit.source for unit in units), *headers) if not Path(path).is_file()]
    if missing:
        raise BuildError(f"the sources of {name} are missing: {', '.join(missing)}; reinstall, or clone the repository")
    cache = Path(cache) if cache is not None else cache_directory()
    library = cache / f"{name}-{_recipe(units, link_command, headers)}-{_compilers(units, link_command)}.so"
    try:
        make_once(library, name, lambda work: _compile(work, units, link_command))
    except OSError as error:
        raise BuildError(
            f"cannot build {name} in {cache}: {error.strerror or error}; make that folder writable, or point "
            "XDG_CACHE_HOME elsewhere"
        ) from error
    return library


def kept_library(
    name: str,
    units: Sequence[Unit],
    link_command: Sequence[str],
    headers: Sequence[str | Path] = (),
    cache: str | Path | None = None,
) -> Path | None:
    """The library that any compiler made earlier by this recipe, or None; arguments as in build_library."""
    cache = Path(cache) if cache is not None else cache_directory()
    found = cache.glob(f"{name}-{_recipe(units, link_command, headers)}-*.so")
    return next(filter(is_whole, sorted(found)), None)


def _recipe(units: Sequence[Unit], link_command: Sequence[str], headers: Sequence[str | Path]) -> str:
    """A hash of sources, headers and flags, without the compilers and without the folders (-I), so that another
    checkout's build serves."""
    digest = hashlib.sha256()
    for unit in units:
        flags = [flag for flag in unit.command[1:] if not flag.startswith("-I")]
        digest.update("\0".join((unit.source.name, *flags, "\n")).encode())
    digest.update("\0".join(link_command[1:]).encode())
    for path in (*(unit.source for unit in units), *headers):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def _compilers(units: Sequence[Unit], link_command: Sequence[str]) -> str:
    """A hash of the compilers by path and version."""
    digest = hashlib.sha256()
    for program in sorted({link_command[0], *(unit.command[0] for unit in units)}):
        digest.update(program.encode() + _version(program))
    return digest.hexdigest()[:8]


def _version(program: str) -> bytes:
    try:
        return subprocess.run([program, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"cannot run the compiler {program}: {error}; install a working one") from error


def _compile(work: Path, units: Sequence[Unit], link_command: Sequence[str]) -> Path:
    """Run the whole build in the folder `work` -> the path of the linked library. Raises BuildError with the compiler's
    words, or OSError if they say that the disk is full, which may be that of temporary files."""
    lines = ["rule run", "  command = $command", "  description = $out"]
    objects = []
    for number, unit in enumerate(units):
        output = f"{number}.o"
        objects.append(output)
        lines += _edge(output, [unit.source], [*unit.command, "-c", unit.source, "-o", output])
    lines += _edge("library.so", objects, [*link_command, *objects, "-o", "library.so"])
    (work / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C"}  # the message that is looked for below is English
    done = subprocess.run([*_ninja(), "-C", str(work)], capture_output=True, text=True, env=environment)
    if done.returncode != 0 and "No space left on device" in done.stdout:
        raise OSError(errno.ENOSPC, "the disk is full, there or in TMPDIR")
    if done.returncode != 0:
        raise BuildError(f"the compiler failed:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    return work / "library.so"


def _edge(output: str, inputs: Sequence[str | Path], command: Sequence[str | Path]) -> list[str]:
    """One build statement: a shell-quoted command in ninja's own quoting."""
    command = " ".join("'" + str(part).replace("'", "'\\''") + "'" for part in command)
    inputs = " ".join(str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for path in inputs)
    return [f"build {output}: run {inputs}", "  command = " + command.replace("$", "$$")]


def _ninja() -> list[str]:
    if find_spec("ninja") is not None:
        return python_command("ninja")
    return [find_program("ninja", remedy="pip install ninja")]
