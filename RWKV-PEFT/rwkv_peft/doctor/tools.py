"""Check what the machine has besides packages and devices: compilers, memory, disk."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..files.room import room_at
from ..memory import main_memory
from .finding import NOTE, OK, Finding


def check_tools() -> Iterator[Finding]:
    """Look for a C++ compiler, ninja and nvcc."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        yield Finding("compiler", OK, first_line(compiler, "--version"))
    else:
        missing = "no C++ compiler: the fast CPU kernel and the offload strategies need one"
        yield Finding("compiler", NOTE, missing, "apt install g++ (Debian, Ubuntu), or xcode-select --install (macOS)")
    if ninja := shutil.which("ninja"):
        yield Finding("ninja program", OK, ninja)
    else:
        missing = "not in PATH: DeepSpeed's own operators need it there"
        yield Finding("ninja program", NOTE, missing, "activate the environment, or pip install ninja")
    if nvcc := shutil.which("nvcc"):
        yield Finding("nvcc", OK, last_release(nvcc))
    else:
        yield Finding("nvcc", NOTE, "no CUDA compiler (only GPU machines need one)")


def first_line(program: str, *arguments: str) -> str:
    """The first line that a program prints."""
    return run(program, *arguments).splitlines()[0]


def last_release(nvcc: str) -> str:
    """nvcc's path and release, e.g. "/usr/local/cuda/bin/nvcc, release 12.6"."""
    found = re.search(r"release [\d.]+", run(nvcc, "--version"))
    return f"{nvcc}, {found[0] if found else 'unknown release'}"


def run(program: str, *arguments: str) -> str:
    """Run a program -> its output, its path if it prints nothing, or the reason why it does not run."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not run: {error}"
    return done.stdout.strip() or program


def check_memory() -> Iterator[Finding]:
    """Look at main memory, and at the disk of the current folder."""
    total, free = main_memory()
    if total:
        available = f", {free / 2**30:.1f} GiB available" if free else ""
        yield Finding("memory", OK, f"{total / 2**30:.1f} GiB{available}")
    disk = room_at(".")
    low = disk < 5 * 2**30
    need = ": a 7B model and its checkpoints need 30 GiB" if low else ""
    yield Finding("disk", NOTE if low else OK, f"{disk / 2**30:.0f} GiB free in {Path.cwd()}{need}")
