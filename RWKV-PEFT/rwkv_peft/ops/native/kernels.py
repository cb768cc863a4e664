"""Built CUDA kernels that share a structure of arguments, each launched by its name: from a library that nvcc linked,
or from a module of NVRTC's."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .driver import Module as DriverModule
from .library import load


class Kernels(Protocol):
    """What can be launched."""

    def run(
        self, name: str, arguments: ctypes.Structure, blocks: int, block: tuple[int, int], stream: int | None
    ) -> int:
        """Enqueue the kernel `name` over `blocks` blocks of `block` (x, y) threads; -> CUDA's error code."""


class Library:
    """Kernels that nvcc compiled, or the tests' shim: NAME_run(arguments, blocks, x, y, stream) for each."""

    def __init__(self, names: Sequence[str], arguments: type[ctypes.Structure], path: str | Path):
        signature = (ctypes.c_int, arguments, *3 * (ctypes.c_int,), ctypes.c_void_p)
        self._library = load(path, *((f"{name}_run", *signature) for name in names))

    def run(
        self, name: str, arguments: ctypes.Structure, blocks: int, block: tuple[int, int], stream: int | None
    ) -> int:
        return getattr(self._library, f"{name}_run")(ctypes.byref(arguments), blocks, *block, stream)


class Module:
    """Kernels that NVRTC compiled: NAME, and the bytes of shared memory that it asks for in NAME_shared."""

    def __init__(self, names: Sequence[str], image: bytes):
        """image: a cubin for the GPU whose context is the current one."""
        self._module = DriverModule(image)
        self._kernels = {name: self._module.kernel(name, self._module.constant(f"{name}_shared")) for name in names}

    def run(
        self, name: str, arguments: ctypes.Structure, blocks: int, block: tuple[int, int], stream: int | None
    ) -> int:
        return self._module.launch(self._kernels[name], blocks, (*block, 1), arguments, stream)
