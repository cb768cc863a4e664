"""Loading a compiled library."""

import ctypes
from pathlib import Path
from typing import Any

from .errors import BuildError

Declaration = tuple[Any, ...]  # of a C function, as `load` takes it


def load(path: str | Path, *functions: Declaration) -> ctypes.CDLL:
    """The library at `path`, its C functions declared: each of `functions` is (name, result type or None, *argument
    types), where a structure's class stands for a pointer to it. Raises BuildError where it cannot be loaded."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete that file so that it is built anew") from error
    for name, result, *arguments in functions:
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [ctypes.POINTER(kind) if issubclass(kind, ctypes.Structure) else kind for kind in arguments]
    return library
