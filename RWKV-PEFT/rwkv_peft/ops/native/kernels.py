"""CUDA kernels that share a structure of arguments, loaded and launched by the driver."""

import ctypes
from collections.abc import Sequence

from .library import BuildError

Block = tuple[int, int]  # a block's (x, y) threads
MAX_DYNAMIC_SHARED_SIZE = 8  # the driver's CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Kernels:
    """The kernels of one source on one GPU. The kernel NAME has its threads per block in NAME_threads, and a block's
    bytes of dynamic shared memory in NAME_shared."""

    def __init__(self, names: Sequence[str], image: bytes) -> None:
        """image: a cubin for the GPU of the current context."""
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise BuildError(f"cannot load the NVIDIA driver's library: {error}; install the driver") from error
        self._context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(self._context))
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), image)
        self._own = {name: (self._constant(f"{name}_threads"), 1) for name in names}
        self._shared = {name: self._constant(f"{name}_shared") for name in names}
        self._functions = {name: self._function(name, self._shared[name]) for name in names}

    def run(self, name: str, arguments: ctypes.Structure, blocks: int, block: Block | None, stream: int | None) -> int:
        """Enqueue a kernel over `blocks` blocks of `block` threads, None for its own; -> CUDA's error code."""
        x, y = block or self._own[name]
        sizes = [ctypes.c_uint(size) for size in (blocks, 1, 1, x, y, 1, self._shared[name])]
        self._call("cuCtxSetCurrent", self._context)  # autograd's threads have no context of their own
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        return self._driver.cuLaunchKernel(self._functions[name], *sizes, ctypes.c_void_p(stream), parameters, None)

    def _function(self, name: str, shared: int) -> ctypes.c_void_p:
        """The driver's handle of a kernel, which may ask for `shared` bytes."""
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        self._call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE, shared)
        return function

    def _constant(self, name: str) -> int:
        """The int that the module holds under `name`."""
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        self._call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self._module, name.encode())
        self._call("cuMemcpyDtoH_v2", ctypes.byref(value), address, ctypes.c_size_t(4))
        return value.value

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status != 0:
            raise BuildError(f"{function} failed with CUDA error {status}; see nvidia-smi for the driver's state")
