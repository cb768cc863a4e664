"""Loading a compiled library, and the error of building or loading one."""

import ctypes
from pathlib import Path
from typing import Any

Declaration = tuple[Any, ...]  # a C function's: (name, result type or None, *argument types)


class BuildError(RuntimeError):
    """A library could not be built or loaded; the message says why and what to do."""


def load(path: str | Path, *functions: Declaration) -> ctypes.CDLL:
    """Load the library at `path` and declare its C functions, each a Declaration, in which a structure's class stands
    for a pointer to it. Raises BuildError if it cannot be loaded."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete that file so that it is built anew") from error
    for name, result, *arguments in functions:
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [ctypes.POINTER(kind) if issubclass(kind, ctypes.Structure) else kind for kind in arguments]
    return library
