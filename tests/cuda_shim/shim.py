"""The CUDA sources on a CPU, with cuda_shim.h in place of the GPU; and a driver that only records launches."""

import ctypes
from pathlib import Path

import pytest
import torch

from cuda_shim.cases import CASES
from rwkv_peft.ops import cross_entropy, decode
from rwkv_peft.ops.bone.cuda import FAMILY as BONE
from rwkv_peft.ops.mix import cuda as mix_cuda
from rwkv_peft.ops.native import cuda
from rwkv_peft.ops.native.build import BuildError, build_library, find_compiler, included_files, load, source_directory
from rwkv_peft.ops.wkv6 import WKV6
from rwkv_peft.ops.wkv7 import WKV7

FAMILIES = {  # all, by name
    family.op: family
    for family in (WKV6.cuda.family, WKV7.cuda.family, mix_cuda.FAMILY, BONE, cross_entropy.CUDA, decode.CUDA)
}
DEVICES = ("shim", "gpu") if torch.cuda.is_available() else ("shim",)
# fibers.h's Order, by name.
ORDERS = ("ascending", "descending", "shuffled", "warps ascending", "warps descending")
call_mix = mix_cuda.call  # which a test may replace


class Shim:
    """A CudaFamily's kernels on the CPU, with a choice of the order in which a block's threads run."""

    def __init__(self, family, path):
        signature = (None, family.structure, ctypes.c_int)
        self._library = load(path, *((f"{name}_run", *signature) for name in family.names))
        self._set_order = self._library.shim_set_order

    def run(self, name, arguments, blocks, stream):
        getattr(self._library, f"{name}_run")(ctypes.byref(arguments), blocks)
        return 0

    def set_order(self, name):
        self._set_order(ORDERS.index(name))


def build(family, sources=None, cache=None, guards=()):
    """Build a Shim of the kernels of `family`, a CudaFamily, in the folder `sources`, which is like cuda/, with further
    flags `guards`, such as a sanitizer's. Raises BuildError without a C++ compiler."""
    sources = source_directory("cuda") if sources is None else Path(sources)
    source = sources / family.source
    shim = Path(__file__).resolve().parent
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-pthread", *guards)
    flags = (*flags, "-fno-strict-aliasing", f"-I{shim}", f"-I{sources}", "-x", "c++")
    headers = [*included_files(source, sources), shim / "cuda_shim.h", shim / "fibers.h"]
    return Shim(family, build_library(f"{source.stem}_shim", source, flags, headers, cache))


def built(family):
    """A CudaFamily's kernels on the CPU, whose threads run in ascending order; skips the test without a compiler."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    kernels = build(family)
    kernels.set_order("ascending")
    return kernels


def mix_call(name, like, tensors, **sizes):
    """cuda.call of the mix operations; tensors that a kernel should fill begin as NaN."""
    layout = {**mix_cuda.LAYOUTS, **mix_cuda.TILED}[name]
    for x in (tensors.get(name) for name in (*layout.outputs, *layout.sums)):
        if x is not None:
            x.fill_(float("nan"))
    call_mix(name, like, tensors, **sizes)


def runner(op, device):
    """A function: a case of a recurrence, and the tokens of a group -> the kernels' results on one of DEVICES."""
    cases = CASES[op]
    if device == "shim":
        kernels = built(cases.cuda.family)
        return lambda case, **group: cases.run(kernels, case, **group)
    on_gpu = cases.cuda.family.kernels
    return lambda case, **group: tuple(x.cpu() for x in cases.run(on_gpu(0), case.mapped(torch.Tensor.cuda), **group))


class RecordingDriver:
    """A driver whose every call succeeds; keeps the launches' structures `arguments`."""

    constant = 1234  # what a module's constants are: the threads or the shared memory that a kernel asks for

    def __init__(self, arguments):
        self.arguments, self.launches, self.current = arguments, [], None

    def cuCtxGetCurrent(self, context):
        context._obj.value = 55
        return 0

    def cuCtxSetCurrent(self, context):
        self.current = context.value
        return 0

    def cuMemcpyDtoH_v2(self, target, source, size):
        target._obj.value = self.constant
        return 0

    def cuLaunchKernel(self, kernel, *rest):
        *sizes, stream, parameters, extra = rest
        arguments = self.arguments.from_buffer_copy(self.arguments.from_address(parameters[0]))
        self.launches.append(([size.value for size in sizes], stream.value, arguments, extra))
        assert self.current == 55  # also on autograd's threads, which start without a context
        self.current = None
        return 0

    def __getattr__(self, name):
        return lambda *arguments: 0


def record(family, monkeypatch):
    """Let a RecordingDriver take what is launched of a CudaFamily's kernels, on stream 7 -> that driver."""
    recorder = RecordingDriver(family.structure)
    with monkeypatch.context() as patch:
        patch.setattr(cuda.ctypes, "CDLL", lambda name: recorder)
        kernels = cuda.Kernels(family.names, b"image")
    monkeypatch.setattr(family, "kernels", lambda device: kernels)
    monkeypatch.setattr(cuda, "stream", lambda x: 7)
    return recorder
