"""Compiles and loads a family's C++ source: one library for each instruction set that is used."""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import arguments, levels
from .build import build_library
from .compiled import constant_when_compiled
from .library import BuildError, Declaration, load
from .sources import included_files, source_directory

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp")


def cpu_library(
    name: str, source: str, flags: Sequence[str], functions: Iterable[Declaration], headers: Sequence[str | Path] = ()
) -> ctypes.CDLL:
    """The library `name` of `source`, a path below cpu/, compiled with FLAGS and `flags`, its `functions` declared as
    in `load`; built anew if one of `headers` changes, too. Raises BuildError as build_library does."""
    root = source_directory("cpu")
    file = root / source
    headers = [*included_files(file, root), *headers]
    return load(build_library(name, file, (*FLAGS, *flags, f"-I{root}"), headers), *functions)


class CpuFamily:
    """The functions of cpu/OP/OP.cpp, compiled on first use for an instruction set, and tried once for each. `level` is
    one of LEVELS, or "" for the best that this processor has. in_graphs: True if their caller also runs them in graphs
    of torch.compile, by an Operator."""

    def __init__(self, op: str, functions: Sequence[Declaration], in_graphs: bool = False) -> None:
        self.op, self.functions, self.in_graphs = op, functions, in_graphs

        @constant_when_compiled  # does not work on methods
        def available() -> bool:
            return self.unavailable() is None

        self.available = available

    def best_level(self) -> str:
        return levels.best_level()

    @functools.cache  # noqa: B019 - families live as long as their modules
    def library(self, level: str = "") -> ctypes.CDLL:
        """The loaded library; BuildError if it cannot be built or loaded (not cached, so that a mended setup
        works)."""
        return self.build(level or self.best_level())

    def build(self, level: str) -> ctypes.CDLL:
        flags = levels.level_flags()[level]
        return cpu_library(f"{self.op}_cpu_{level}", f"{self.op}/{self.op}.cpp", flags, self.functions)

    @functools.cache  # noqa: B019
    def unavailable(self, level: str = "") -> str | None:
        """None if they work here, else the reason and the remedy."""
        if level and not levels.is_here(level):
            return f"this processor has no {level}; its best is cpu:{levels.best_level()}"
        try:
            self.library(level)
        except BuildError as error:
            return str(error)
        return None

    def takes(self, first: Tensor, *others: Tensor | None) -> bool:
        """True if the kernels take these tensors (arguments.takes), and can be built here."""
        if torch.compiler.is_compiling() and not self.in_graphs:
            return False
        return arguments.takes(first, *others) and self.available()
