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
    yield (
        Finding("compiler", OK, first_line(compiler, "--version"))
        if compiler
        else Finding(
            "compiler",
            NOTE,
            "no C++ compiler: the fast CPU kernel and the offload strategies need one",
            "apt install g++ (Debian, Ubuntu), or xcode-select --install (macOS)",
        )
    )
    ninja = shutil.which("ninja")
    yield (
        Finding("ninja program", OK, ninja)
        if ninja
        else Finding(
            "ninja program",
            NOTE,
            "not in PATH: DeepSpeed's own operators need it there",
            "activate the environment, or pip install ninja",
        )
    )
    nvcc = shutil.which("nvcc")
    yield Finding(
        "nvcc", OK if nvcc else NOTE, last_release(nvcc) if nvcc else "no CUDA compiler (only GPU machines need one)"
    )


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
        return (
            subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30).stdout.strip() or program
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not run: {error}"


def check_memory() -> Iterator[Finding]:
    """Look at main memory, and at the disk of the current folder."""
    total, free = main_memory()
    if total:
        yield Finding(
            "memory", OK, f"{total / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} GiB available" if free else "")
        )
    disk = room_at(".")
    low = disk < 5 * 2**30
    yield Finding(
        "disk",
        NOTE if low else OK,
        f"{disk / 2**30:.0f} GiB free in {Path.cwd()}"
        + (": a 7B model and its checkpoints need 30 GiB" if low else ""),
    )
