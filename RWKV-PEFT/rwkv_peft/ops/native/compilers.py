"""The compilers of this machine: where they are, and what they take."""

import shutil
import subprocess
from collections.abc import Sequence

from .errors import BuildError


def find_program(*names: str, remedy: str) -> str:
    """The path of the first of `names` that the system has; BuildError with `remedy` where it has none."""
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"no {' or '.join(names)} on this machine's PATH; {remedy}")


def find_compiler() -> str:
    """The path of a C++ compiler; BuildError where there is none."""
    remedy = "install one (Debian, Ubuntu: apt install g++), or take backend='reference'"
    return find_program("g++", "clang++", remedy=remedy)


def find_nvcc() -> str:
    """nvcc's path; BuildError where there is none."""
    return find_program(
        *("nvcc", "/usr/local/cuda/bin/nvcc"),
        remedy="install the CUDA toolkit and put its bin folder on PATH, or pip install nvidia-cuda-nvrtc",
    )


def compiler_knows(flags: Sequence[str]) -> bool:
    """Whether the C++ compiler takes these flags; where there is none, a library may be kept that another made."""
    try:
        command = [find_compiler(), *flags, "-E", "-x", "c++", "/dev/null"]
    except BuildError:
        return True
    return subprocess.run(command, capture_output=True).returncode == 0
