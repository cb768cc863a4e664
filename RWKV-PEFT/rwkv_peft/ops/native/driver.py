"""A module of CUDA kernels, loaded and launched through the driver: what a library that nvcc links does by itself."""

import ctypes
from collections.abc import Sequence

from .errors import BuildError

Kernel = tuple[ctypes.c_void_p, int]  # the driver's handle, and bytes of dynamic shared memory a block
MAX_DYNAMIC_SHARED_SIZE = 8  # the driver's CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Module:
    """The kernels of a cubin on one GPU."""

    def __init__(self, image: bytes) -> None:
        """image: a cubin for the GPU whose context is the current one."""
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise BuildError(f"cannot load the NVIDIA driver's library: {error}; install the driver") from error
        self._context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(self._context))
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), image)

    def kernel(self, name: str, shared: int) -> Kernel:
        """What `launch` takes: the kernel `name`, with `shared` bytes of dynamic shared memory a block."""
        kernel = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(kernel), self._module, name.encode())
        self._call("cuFuncSetAttribute", kernel, MAX_DYNAMIC_SHARED_SIZE, shared)
        return kernel, shared

    def constant(self, name: str) -> int:
        """The int that the module holds under `name`."""
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        self._call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self._module, name.encode())
        self._call("cuMemcpyDtoH_v2", ctypes.byref(value), address, ctypes.c_size_t(4))
        return value.value

    def launch(
        self, kernel: Kernel, grid: int, block: Sequence[int], arguments: ctypes.Structure, stream: int | None
    ) -> int:
        """Enqueue a kernel over `grid` blocks of `block` (x, y, z) threads, given a structure; -> CUDA's error code."""
        function, shared = kernel
        sizes = [ctypes.c_uint(size) for size in (grid, 1, 1, *block, shared)]
        self._call("cuCtxSetCurrent", self._context)  # autograd's threads have no context of their own
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        return self._driver.cuLaunchKernel(function, *sizes, ctypes.c_void_p(stream), parameters, None)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status != 0:
            raise BuildError(f"{function} failed with CUDA error {status}; see nvidia-smi for the driver's state")
