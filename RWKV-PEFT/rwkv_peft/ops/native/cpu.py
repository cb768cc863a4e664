"""A family's C++ source, compiled on first use: one library for each instruction set that is used."""

import ctypes
import functools
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .build import BuildError, Declaration, build_library, compiler_knows, included_files, load, source_directory
from .calls import constant_when_compiled, takes

LEVELS = ("avx512bf16", "avx512", "avx2", "portable")  # fastest first
AVX2_FLAGS = ("-mavx2", "-mfma")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512")
AVX512BF16_FLAGS = (*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni")  # products of pairs; bfloat16 came after VNNI


@functools.cache
def best_level() -> str:
    """The fastest of LEVELS that this processor has; avx512bf16 only if the compiler knows it."""
    level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    if level not in level_flags():
        return "portable"
    has_bfloat16 = level == "avx512" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "avx512bf16" if has_bfloat16 and compiler_knows(AVX512BF16_FLAGS) else level


def is_here(level: str) -> bool:
    """True if this processor has the given one of LEVELS."""
    return LEVELS.index(level) >= LEVELS.index(best_level())


def level_flags() -> dict[str, tuple[str, ...]]:
    """The instruction sets of this machine's architecture, best first -> the compiler's flags."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"portable": ()}
    return {"avx512bf16": AVX512BF16_FLAGS, "avx512": AVX512_FLAGS, "avx2": AVX2_FLAGS, "portable": ()}


FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp")


def cpu_library(
    name: str, source: str, flags: Sequence[str], functions: Iterable[Declaration], headers: Sequence[Path] = ()
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
        return best_level()

    @functools.cache  # noqa: B019 - families live as long as their modules
    def library(self, level: str = "") -> ctypes.CDLL:
        """The loaded library; BuildError, uncached, if it cannot be built or loaded."""
        return self.build_level(level or self.best_level())

    def build_level(self, level: str) -> ctypes.CDLL:
        flags = level_flags()[level]
        return cpu_library(f"{self.op}_cpu_{level}", f"{self.op}/{self.op}.cpp", flags, self.functions)

    @functools.cache  # noqa: B019
    def unavailable(self, level: str = "") -> str | None:
        """None if they work here, else the reason and the remedy."""
        if level and not is_here(level):
            return f"this processor has no {level}; its best is cpu:{best_level()}"
        try:
            self.library(level)
        except BuildError as error:
            return str(error)
        return None

    def takes(self, first: Tensor, *others: Tensor | None) -> bool:
        """True if the kernels take these tensors (calls.takes), and can be built here."""
        if torch.compiler.is_compiling() and not self.in_graphs:
            return False
        return takes(first, *others) and self.available()
