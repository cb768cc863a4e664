"""The CUDA kernels where NVRTC compiled them: which to launch, as wkv7.cu's C interface chooses where nvcc did."""

from types import MappingProxyType

from ..native.driver import Module as DriverModule

STRIP = 16  # state elements a thread in the plain kernels; plain.cuh's STRIP
CHUNKED = MappingProxyType({"wkv7_forward_64": 256, "wkv7_backward_64": 128})  # threads a block
PLAIN = ("float32", "bfloat16")  # by Arguments.scalar


class Module:
    """The kernels on one GPU: forward and backward(reference to Arguments, stream) -> CUDA's error code."""

    def __init__(self, image: bytes):
        """image: a cubin for the GPU whose context is the current one."""
        self._module = DriverModule(image)
        self._kernels = {}
        for name in CHUNKED:
            self._kernels[name] = self._module.kernel(name, self._module.constant(name + "_shared"))
        shared = self._module.constant("wkv7_plain_shared")
        for direction in ("forward", "backward"):
            for scalar in PLAIN:
                name = f"wkv7_{direction}_plain_{scalar}"
                self._kernels[name] = self._module.kernel(name, shared)

    def forward(self, arguments, stream):
        return self._launch("forward", arguments._obj, stream)

    def backward(self, arguments, stream):
        return self._launch("backward", arguments._obj, stream)

    def _launch(self, direction, a, stream):
        name, block = plan(direction, a.head_size, a.scalar)
        return self._module.launch(self._kernels[name], a.heads * a.sequences, block, a, stream)


def plan(direction: str, head_size: int, scalar: int) -> tuple[str, tuple[int, int, int]]:
    """(the kernel's name, its block): what wkv7.cu's C interface chooses for the same arguments."""
    if PLAIN[scalar] == "bfloat16" and head_size == 64:
        name = f"wkv7_{direction}_64"
        return name, (CHUNKED[name], 1, 1)
    strips = 1
    while strips * STRIP < head_size:
        strips *= 2
    rows = 32 // strips  # of a warp
    return f"wkv7_{direction}_plain_{PLAIN[scalar]}", (strips, -(-head_size // rows) * rows, 1)
