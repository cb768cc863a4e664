"""The CUDA kernels where NVRTC compiled them: which to launch, as wkv6.cu's C interface chooses where nvcc did."""

from ..native.driver import Module as DriverModule

STRIP = 16  # state elements a thread in the plain kernels; plain.cuh's STRIP
CHUNKED = (("forward", 32), ("forward", 64), ("forward", 128), ("backward", 32), ("backward", 64))
PLAIN = ("float32", "bfloat16")  # by Arguments.scalar


class Module:
    """The kernels on one GPU: forward and backward(reference to Arguments, stream) -> CUDA's error code."""

    def __init__(self, image):
        """image: a cubin for the GPU whose context is the current one."""
        self._module = DriverModule(image)
        self._kernels = {}
        for direction, head_size in CHUNKED:
            name = f"wkv6_{direction}_{head_size}"
            self._kernels[name] = self._module.kernel(name, self._module.constant(name + "_shared"))
        for direction in ("forward", "backward"):
            for scalar in PLAIN:
                name = f"wkv6_{direction}_plain_{scalar}"
                self._kernels[name] = self._module.kernel(name, 0)

    def forward(self, arguments, stream):
        return self._launch("forward", arguments._obj, stream)

    def backward(self, arguments, stream):
        return self._launch("backward", arguments._obj, stream)

    def _launch(self, direction, a, stream):
        name, block = plan(direction, a.head_size, a.scalar)
        return self._module.launch(self._kernels[name], a.heads * a.sequences, block, a, stream)


def plan(direction, head_size, scalar):
    """(the kernel's name, its block): what wkv6.cu's C interface chooses for the same arguments."""
    if PLAIN[scalar] == "bfloat16" and (direction, head_size) in CHUNKED:
        return f"wkv6_{direction}_{head_size}", (2 * head_size, 1, 1)
    return f"wkv6_{direction}_plain_{PLAIN[scalar]}", (head_size, -(-head_size // STRIP), 1)
