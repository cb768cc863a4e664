"""Compile native sources into a shared library, once: cached by content, safe when several processes build at once.

A library's file name carries a hash of everything that decides its content (sources, commands, compiler version), so
that a change of any of them builds anew and nothing stale is ever loaded. Processes that want the same library wait
for one another on a lock file; the finished library appears under its name in one atomic rename.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from .compilers import find_program
from .errors import BuildError


@dataclass(frozen=True)
class Unit:
    """One compilation: `command` (compiler and flags) turns `source` into an object file."""

    source: Path
    command: tuple[str, ...]


def cache_directory():
    """Where libraries are kept: rwkv_peft under the user's cache folder (XDG base directory rules)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rwkv_peft"


def build_library(name, units, link_command, headers=(), cache=None):
    """Compile `units`, link their objects with `link_command` (linker and flags), and return the library's path.

    headers: files whose content matters besides the units' sources. cache: a folder, by default cache_directory().
    Raises BuildError with the compiler's own words where it fails; a failure leaves nothing behind.
    """
    missing = [str(path) for path in (*(unit.source for unit in units), *headers) if not Path(path).is_file()]
    if missing:
        raise BuildError(f"the sources of {name} are missing: {', '.join(missing)}; reinstall, or clone the repository")
    cache = Path(cache) if cache is not None else cache_directory()
    library = cache / f"{name}-{_digest(units, link_command, headers)}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            if not library.exists():  # another process may have built it while this one waited
                with tempfile.TemporaryDirectory(dir=cache) as work:
                    os.replace(_compile(Path(work), units, link_command), library)
    except OSError as error:
        raise BuildError(
            f"cannot build {name} in {cache}: {error}; make that folder writable, or point XDG_CACHE_HOME elsewhere"
        ) from error
    return library


def _digest(units, link_command, headers):
    digest = hashlib.sha256()
    programs = {link_command[0], *(unit.command[0] for unit in units)}
    for program in sorted(programs):
        digest.update(_version(program))
    for unit in units:
        digest.update("\0".join((unit.source.name, *unit.command, "\n")).encode())
    digest.update("\0".join(link_command).encode())
    for path in (*(unit.source for unit in units), *headers):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def _version(program):
    try:
        return subprocess.run([program, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"cannot run the compiler {program}: {error}; install a working one") from error


def _compile(work, units, link_command):
    """Run the whole build in the folder `work`; the path of the linked library."""
    lines = ["rule run", "  command = $command", "  description = $out"]
    objects = []
    for number, unit in enumerate(units):
        output = f"{number}.o"
        objects.append(output)
        lines += _edge(output, [unit.source], [*unit.command, "-c", unit.source, "-o", output])
    lines += _edge("library.so", objects, [*link_command, *objects, "-o", "library.so"])
    (work / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = subprocess.run([*_ninja(), "-C", str(work)], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"the compiler failed:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    return work / "library.so"


def _edge(output, inputs, command):
    """One build statement: a shell-quoted command in ninja's own quoting."""
    command = " ".join("'" + str(part).replace("'", "'\\''") + "'" for part in command)
    inputs = " ".join(str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for path in inputs)
    return [f"build {output}: run {inputs}", "  command = " + command.replace("$", "$$")]


def _ninja():
    if find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    return [find_program("ninja", remedy="pip install ninja")]
