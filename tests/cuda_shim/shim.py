"""Builds the CUDA sources for the CPU, with cuda_shim.h in place of the GPU."""

import ctypes
from pathlib import Path

from rwkv_peft.ops.native.build import Recipe, build_library
from rwkv_peft.ops.native.compilers import find_compiler
from rwkv_peft.ops.native.sources import included_files, source_directory
from rwkv_peft.ops.wkv6.cuda import FAMILY as WKV6

# fibers.h's Order, by name.
ORDERS = ("ascending", "descending", "shuffled", "warps ascending", "warps descending")


class Shim:
    """The kernels on the CPU: a CudaFamily's library, with a choice of the order in which a block's threads run."""

    def __init__(self, family, path):
        self._library = family.library(path)
        self._set_order = ctypes.CDLL(str(path)).shim_set_order

    def __getattr__(self, name):
        return getattr(self._library, name)

    def set_order(self, name):
        self._set_order(ORDERS.index(name))


def build(family=WKV6, sources=None, cache=None, guards=()):
    """Build a Shim of the kernels of `family`, a CudaFamily, in the folder `sources`, which is like cuda/, with further
    flags `guards`, such as a sanitizer's. Raises BuildError without a C++ compiler."""
    sources = source_directory("cuda") if sources is None else Path(sources)
    source = sources / family.source
    shim = Path(__file__).resolve().parent
    compiler = find_compiler()
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-pthread", *guards)
    compiling = (compiler, *flags, "-fno-strict-aliasing", f"-I{shim}", f"-I{sources}", "-x", "c++")
    headers = [*included_files(source, sources), shim / "cuda_shim.h", shim / "fibers.h"]
    recipe = Recipe(source, compiling, (compiler, "-shared", "-pthread", *guards), headers)
    return Shim(family, build_library(f"{source.stem}_shim", recipe, cache))
