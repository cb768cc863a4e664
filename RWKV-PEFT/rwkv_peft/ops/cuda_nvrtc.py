"""The CUDA kernels without nvcc: compiled by NVRTC, CUDA's run-time compiler, and launched through the driver.

NVRTC comes with CUDA builds of torch (the nvidia-cuda-nvrtc wheels) or with the CUDA toolkit. It and the driver are
called through ctypes, so that nothing else needs to be installed.
"""

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from .build import BuildError, cache_directory, source_directory

SONAMES = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12")
OPTIONS = ("-std=c++17",)
MAX_DYNAMIC_SHARED_SIZE = 8  # the driver's CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
STRIP = 16  # state elements a thread in the plain kernels; wkv6_plain.cuh's STRIP
CHUNKED = (("forward", 32), ("forward", 64), ("forward", 128), ("backward", 32), ("backward", 64))
PLAIN = ("float32", "bfloat16")  # by Arguments.scalar


class Module:
    """The kernels on one GPU: forward and backward(reference to Arguments, stream) -> CUDA's error code."""

    def __init__(self, image):
        """image: a cubin for the GPU whose context is the current one."""
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise BuildError(f"cannot load the NVIDIA driver's library: {error}; install the driver") from error
        self._context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(self._context))
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), image)
        self._kernels = {}
        for direction, head_size in CHUNKED:
            name = f"wkv6_{direction}_{head_size}"
            self._kernels[name] = self._prepare(name, self._constant(name + "_shared"))
        for direction in ("forward", "backward"):
            for scalar in PLAIN:
                name = f"wkv6_{direction}_plain_{scalar}"
                self._kernels[name] = self._prepare(name, 0)

    def forward(self, arguments, stream):
        return self._launch("forward", arguments, stream)

    def backward(self, arguments, stream):
        return self._launch("backward", arguments, stream)

    def _launch(self, direction, arguments, stream):
        a = arguments._obj
        name, block = plan(direction, a.head_size, a.scalar)
        kernel, shared = self._kernels[name]
        sizes = [ctypes.c_uint(size) for size in (a.heads * a.sequences, 1, 1, *block, shared)]
        self._call("cuCtxSetCurrent", self._context)  # autograd's threads have no context of their own
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(a))
        return self._driver.cuLaunchKernel(kernel, *sizes, ctypes.c_void_p(stream), parameters, None)

    def _prepare(self, name, shared):
        kernel = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(kernel), self._module, name.encode())
        self._call("cuFuncSetAttribute", kernel, MAX_DYNAMIC_SHARED_SIZE, shared)
        return kernel, shared

    def _constant(self, name):
        """The int that the module holds under `name`."""
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        self._call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self._module, name.encode())
        self._call("cuMemcpyDtoH_v2", ctypes.byref(value), address, ctypes.c_size_t(4))
        return value.value

    def _call(self, function, *arguments):
        status = getattr(self._driver, function)(*arguments)
        if status != 0:
            raise BuildError(f"{function} failed with CUDA error {status}; see nvidia-smi for the driver's state")


def plan(direction, head_size, scalar):
    """(the kernel's name, its block): what wkv6_cuda.cu's C interface chooses for the same arguments."""
    if PLAIN[scalar] == "bfloat16" and (direction, head_size) in CHUNKED:
        return f"wkv6_{direction}_{head_size}", (2 * head_size, 1, 1)
    return f"wkv6_{direction}_plain_{PLAIN[scalar]}", (head_size, -(-head_size // STRIP), 1)


def cubin(architecture, headers, nvrtc):
    """wkv6_cuda.cu compiled by the library `nvrtc` for one architecture ("sm_90", ...), as bytes; cached by content."""
    sources = source_directory()
    digest = hashlib.sha256(" ".join((architecture, *OPTIONS)).encode())
    for path in (sources / "wkv6_cuda.cu", *headers):
        digest.update(path.read_bytes())
    cached = cache_directory() / f"wkv6_cuda_{architecture}-{digest.hexdigest()[:16]}.cubin"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cached.with_suffix(".lock")):
            if not cached.exists():
                with tempfile.TemporaryDirectory(dir=cached.parent) as work:
                    finished = Path(work) / cached.name
                    finished.write_bytes(_compile(nvrtc, sources, architecture))
                    os.replace(finished, cached)
        return cached.read_bytes()
    except OSError as error:
        raise BuildError(
            f"cannot keep the CUDA kernels at {cached}: {error}; make that folder writable, or point XDG_CACHE_HOME "
            "elsewhere"
        ) from error


def _compile(nvrtc, sources, architecture):
    program = ctypes.c_void_p()
    code = (sources / "wkv6_cuda.cu").read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"wkv6_cuda.cu", 0, None, None)
    try:
        options = [f"--gpu-architecture={architecture}", *OPTIONS, f"-I{sources}"]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array) != 0:
            log = _text(nvrtc, program, "ProgramLog").decode(errors="replace")
            raise BuildError(f"NVRTC failed for {architecture}:\n{log[-4000:]}")
        return _text(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc, program, what):
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.raw


def find_nvrtc():
    """The loaded NVRTC library, from the nvidia wheels or the system; None where there is none."""
    for path in _wheel_libraries():
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by its bare name
        return ctypes.CDLL(str(path))
    for name in SONAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue  # the next name may be there
    return None


def _wheel_libraries():
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [path for folder in folders for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"))]
