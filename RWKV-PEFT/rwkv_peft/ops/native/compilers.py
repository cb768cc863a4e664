"""The compilers of this machine: finds them, asks for their flags and architectures, and chooses one for a GPU."""

import shutil
import subprocess
from collections.abc import Sequence

from .library import BuildError

JETSON = ("87", "101")  # they do not run the code of other GPUs of their major version, nor do those run theirs


def find_program(*names: str, remedy: str) -> str:
    """The path of the first of `names` that the system has; BuildError with `remedy` if it has none."""
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"no {' or '.join(names)} on this machine's PATH; {remedy}")


def find_compiler() -> str:
    """The path of a C++ compiler; BuildError if there is none."""
    remedy = "install one (Debian, Ubuntu: apt install g++), or take backend='reference'"
    return find_program("g++", "clang++", remedy=remedy)


def find_nvcc() -> str:
    """nvcc's path; BuildError if there is none."""
    return find_program(
        *("nvcc", "/usr/local/cuda/bin/nvcc"),
        remedy="install the CUDA toolkit and put its bin folder on PATH, or pip install nvidia-cuda-nvrtc",
    )


def compiler_knows(flags: Sequence[str]) -> bool:
    """True if the C++ compiler takes these flags, or if there is none, because a library may be in the cache."""
    try:
        command = [find_compiler(), *flags, "-E", "-x", "c++", "/dev/null"]
    except BuildError:
        return True
    return subprocess.run(command, capture_output=True).returncode == 0


def nvcc_architectures(nvcc: str) -> list[str]:
    """The architectures that an nvcc compiles for, "80", "90", …; BuildError if it does not say."""
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{nvcc} --list-gpu-code failed: {done.stderr.strip()}; install CUDA 11.8 or newer")
    return [word.removeprefix("sm_") for word in done.stdout.split()]


def architecture_for(capability: tuple[int, int], known: Sequence[str], compiler: str) -> str:
    """The architecture, among those `known` to a compiler, to compile for on a GPU of a compute capability: its own, or
    the latest older one of the same major version, whose code it runs too. BuildError if there is none."""
    major, minor = capability
    own = f"{major}{minor}"
    older = [f"{major}{n}" for n in reversed(range(minor)) if f"{major}{n}" not in JETSON and own not in JETSON]
    found = next((architecture for architecture in (own, *older) if architecture in known), None)
    if found is None:
        raise BuildError(
            f"{compiler} does not compile for compute capability {major}.{minor}; install a newer CUDA, with the build "
            "of torch that belongs to it"
        )
    return found
