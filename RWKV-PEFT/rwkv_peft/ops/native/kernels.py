"""Built CUDA kernels that share a structure of arguments, each launched by its name: here from a library that nvcc
linked, in driver.py from a module."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .library import load

Block = tuple[int, int]  # a block's (x, y) threads


class Kernels(Protocol):
    """A set of kernels that can be launched."""

    def run(self, name: str, arguments: ctypes.Structure, blocks: int, block: Block | None, stream: int | None) -> int:
        """Enqueue the kernel `name` over `blocks` blocks of `block` threads (None: the kernel's own number) -> CUDA's
        error code."""


class Library:
    """Kernels that nvcc compiled, or the tests' shim: NAME_run(arguments, blocks, x, y, stream) and NAME_threads."""

    def __init__(self, names: Sequence[str], structure: type[ctypes.Structure], path: str | Path) -> None:
        signature = (ctypes.c_int, structure, *3 * (ctypes.c_int,), ctypes.c_void_p)
        self._library = load(path, *((f"{name}_run", *signature) for name in names))
        self._own = {name: (ctypes.c_int.in_dll(self._library, f"{name}_threads").value, 1) for name in names}

    def run(self, name: str, arguments: ctypes.Structure, blocks: int, block: Block | None, stream: int | None) -> int:
        x, y = block or self._own[name]
        return getattr(self._library, f"{name}_run")(ctypes.byref(arguments), blocks, x, y, stream)
