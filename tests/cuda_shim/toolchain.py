"""NVIDIA's tools without a GPU: the assembler's reports on the CUDA kernels, and a driver that only records."""

import re

from rwkv_peft.ops.native import cuda


def check_without_spills(report, kernels):
    """Assert by the assembler's report that `kernels` keep all values in registers."""
    for kernel in kernels:
        found = re.search(
            rf"Function properties for {kernel}\n[\s.ptxas]*?(\d+) bytes stack frame, (\d+) bytes spill stores", report
        )
        assert found, f"no report on {kernel}"
        assert found.groups() == ("0", "0"), f"{kernel} uses local memory: {found.group()}"


def kernels_of(source):
    """(name, most threads a block) of every kernel of a recurrence's source."""
    found = re.findall(r"^RECURRENCE_KERNEL\((\w+), .*?, (\d+), \w+,\s", source, re.MULTILINE)
    return [(name, int(threads)) for name, threads in found]


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
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: recorder)
    built = cuda.Kernels(family.names, b"image")
    monkeypatch.setattr(family, "kernels", lambda device: built)
    monkeypatch.setattr(cuda, "stream", lambda x: 7)
    return recorder
