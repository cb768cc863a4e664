"""Builds the CUDA sources for the CPU, with cuda_shim.h in place of the GPU."""

import ctypes
from pathlib import Path

from rwkv_peft.ops.native.build import build_library, included_files, load, source_directory
from rwkv_peft.ops.wkv6.cuda import FAMILY as WKV6

# fibers.h's Order, by name.
ORDERS = ("ascending", "descending", "shuffled", "warps ascending", "warps descending")


class Shim:
    """A CudaFamily's kernels on the CPU, with a choice of the order in which a block's threads run."""

    def __init__(self, family, path):
        signature = (None, family.structure, *3 * (ctypes.c_int,))
        self._library = load(path, *((f"{name}_run", *signature) for name in family.names))
        self._set_order = self._library.shim_set_order

    def run(self, name, arguments, blocks, block, stream):
        x, y = block or (ctypes.c_int.in_dll(self._library, f"{name}_threads").value, 1)
        getattr(self._library, f"{name}_run")(ctypes.byref(arguments), blocks, x, y)
        return 0

    def set_order(self, name):
        self._set_order(ORDERS.index(name))


def build(family=WKV6, sources=None, cache=None, guards=()):
    """Build a Shim of the kernels of `family`, a CudaFamily, in the folder `sources`, which is like cuda/, with further
    flags `guards`, such as a sanitizer's. Raises BuildError without a C++ compiler."""
    sources = source_directory("cuda") if sources is None else Path(sources)
    source = sources / family.source
    shim = Path(__file__).resolve().parent
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-pthread", *guards)
    flags = (*flags, "-fno-strict-aliasing", f"-I{shim}", f"-I{sources}", "-x", "c++")
    headers = [*included_files(source, sources), shim / "cuda_shim.h", shim / "fibers.h"]
    return Shim(family, build_library(f"{source.stem}_shim", source, flags, headers, cache))
