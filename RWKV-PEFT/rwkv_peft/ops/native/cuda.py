"""The CUDA kernels of one source, which take one structure by value: compiled by NVRTC on first use, launched
by the driver.
"""

import ctypes
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...gpus import refusal
from .build import BuildError, cache_directory, content_hash, included_files, make_once, source_directory
from .calls import constant_when_compiled

FULL_MEMORY = 2  # the driver's CUDA_ERROR_OUT_OF_MEMORY
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
        self._threads = {name: self._constant(f"{name}_threads") for name in names}
        self._shared = {name: self._constant(f"{name}_shared") for name in names}
        self._functions = {name: self._function(name, self._shared[name]) for name in names}

    def run(self, name: str, arguments: ctypes.Structure, blocks: int, stream: int | None) -> int:
        """Enqueue a kernel over `blocks` blocks; -> CUDA's error code."""
        sizes = [ctypes.c_uint(size) for size in (blocks, 1, 1, self._threads[name], 1, 1, self._shared[name])]
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
        if status == FULL_MEMORY:  # no BuildError, which would turn the kernels off
            raise torch.OutOfMemoryError(f"{function}: CUDA error: out of memory")
        if status != 0:
            raise BuildError(f"{function} failed with CUDA error {status}; see nvidia-smi for the driver's state")


SONAMES = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12")
OPTIONS = ("-std=c++17",)
JETSON = ("87", "101")  # they do not run the code of other GPUs of their major version, nor do those run theirs


class Nvrtc:
    """One NVRTC library: its version, "13.0", and the architectures that it compiles for, "80", "90", …"""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        library.nvrtcGetSupportedArchs(numbers)
        self.architectures = [str(number) for number in numbers]

    def architecture_for(self, capability: tuple[int, int]) -> str:
        """The architecture to compile for on a GPU of a compute capability: its own, or the latest older one of the
        same major version, with code that it runs too. BuildError if there is none."""
        major, minor = capability
        own = f"{major}{minor}"
        older = [f"{major}{n}" for n in reversed(range(minor)) if f"{major}{n}" not in JETSON and own not in JETSON]
        chosen = next((architecture for architecture in (own, *older) if architecture in self.architectures), None)
        if chosen is None:
            raise BuildError(
                f"it does not compile for compute capability {major}.{minor}; install a newer CUDA, with the build of "
                "torch that belongs to it"
            )
        return chosen


def compilers() -> Iterator[Nvrtc]:
    """Every NVRTC of this machine, each version once: of nvidia's wheels, bundled with torch, in conda's environment,
    of the system.

    Those with the major version of torch's CUDA come first: the driver runs torch, and so takes their code, but may be
    too old for a newer compiler's.
    """
    of_torch = re.compile(rf"\.so\.{(torch.version.cuda or '').partition('.')[0]}(\.|$)")
    seen = set()
    for path in sorted([*map(str, installed_libraries()), *SONAMES], key=lambda path: not of_torch.search(path)):
        compiler = _load(path)
        if compiler is not None and compiler.version not in seen:
            seen.add(compiler.version)
            yield compiler


def _load(path: str) -> Nvrtc | None:
    """The NVRTC at a path, or by a bare name that the system finds; None if it cannot be loaded, or is older than CUDA
    11.2 and so cannot list its architectures."""
    try:
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins*.so*")) if "/" in path else ():
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by its bare name
        return Nvrtc(ctypes.CDLL(path))
    except (OSError, AttributeError):
        return None


def installed_libraries() -> list[Path]:
    """The NVRTC libraries that come with Python packages; a torch that bundles its own may add a hash to the name."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [] if spec is None else spec.submodule_search_locations or []
    places = [(Path(folder), "*/lib/libnvrtc.so.*") for folder in wheels]
    places += [(Path(torch.__file__).parent, "lib/libnvrtc*.so*")]
    places += [(Path(sys.prefix), pattern) for pattern in ("lib/libnvrtc.so.*", "targets/*/lib/libnvrtc.so.*")]
    libraries = [path for folder, pattern in places for path in sorted(folder.glob(pattern))]
    return [path for path in libraries if "builtins" not in path.name]


def cubin(name: str, source: str, architecture: str, compiler: Nvrtc) -> bytes:
    """Compile `source`, a path below cuda/, by one NVRTC for one architecture ("sm_90", ...) -> the cubin's bytes.

    Cached under `name` by content and by the compiler's version, because a driver may refuse a newer compiler's code.
    """
    root = source_directory("cuda")
    file = root / source
    key = content_hash((architecture, compiler.version, *OPTIONS), (file, *included_files(file, root)))

    def make(work: Path) -> Path:
        finished = work / "kernels.cubin"
        finished.write_bytes(_compile(compiler.library, file, root, architecture))
        return finished

    cached = cache_directory() / f"{name}_{architecture}-{key}.cubin"
    return make_once(cached, f"{name}_{architecture}", make).read_bytes()


def _compile(nvrtc: ctypes.CDLL, source: Path, root: Path, architecture: str) -> bytes:
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        options = [f"--gpu-architecture={architecture}", *OPTIONS, f"-I{root}"]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array) != 0:
            log = _text(nvrtc, program, "ProgramLog").decode(errors="replace")
            raise BuildError(f"NVRTC failed for {architecture}:\n{log[-4000:]}")
        return _text(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.raw


OLDEST_CAPABILITY = (8, 0)  # the first with cp.async and bf16 products


class CudaFamily:
    """The kernels of cuda/OP/OP.cu. in_graphs: as in CpuFamily."""

    def __init__(
        self, op: str, names: Sequence[str], structure: type[ctypes.Structure], in_graphs: bool = False
    ) -> None:
        self.op, self.source, self.names, self.structure = op, f"{op}/{op}.cu", names, structure
        self.in_graphs = in_graphs

        @constant_when_compiled  # does not work on methods
        @functools.cache
        def available(device: int) -> bool:
            return self.unavailable(device) is None

        self.available = available

    @functools.cache  # noqa: B019 - families live as long as their modules
    def kernels(self, device: int) -> Kernels:
        """The kernels for GPU number `device`, of the first NVRTC with code that loads there. Raises BuildError,
        uncached, with the reason of each, if there is none."""
        reasons = []
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes torch's context the thread's current one
            for compiler in compilers():
                try:
                    architecture = compiler.architecture_for(torch.cuda.get_device_capability(device))
                    image = cubin(f"{self.op}_cuda", self.source, f"sm_{architecture}", compiler)
                    return Kernels(self.names, image)
                except BuildError as error:
                    reasons.append(f"NVRTC {compiler.version}: {error}")
        raise BuildError("\n".join(reasons) or "no NVRTC, CUDA's compiler, is here; pip install nvidia-cuda-nvrtc")

    def unavailable(self, device: int | None = None) -> str | None:
        """None if they work on a GPU, by default the current one, else the reason and the remedy."""
        reason = misfit(device)
        if reason is not None:
            return reason
        try:
            self.kernels(torch.cuda.current_device() if device is None else device)
        except BuildError as error:
            return str(error)
        return None

    def takes(self, first: Tensor, *others: Tensor | None) -> bool:
        """True if the kernels take these tensors (None: not given): real ones on one GPU, all bfloat16. Tensors without
        data, with which a GPU's memory is planned, are taken like a GPU's."""
        if (
            first.dtype != torch.bfloat16
            or first.numel() == 0
            or not all([x is None or (x.dtype == first.dtype and x.device == first.device) for x in others])
            or (torch.compiler.is_compiling() and not self.in_graphs)
            or type(first) is not Tensor  # a fake one
        ):
            return False
        return first.is_meta or first.is_cuda and self.available(first.device.index)

    def run(self, name: str, like: Tensor, given: Mapping[str, Any], blocks: int) -> None:
        """Enqueue a kernel on the GPU of `like`, over `blocks` blocks. given: the structure's fields by name: tensors,
        passed as addresses (None: null), and numbers. Does nothing for tensors without data; RuntimeError if it
        fails."""
        if like.is_meta or not blocks:
            return
        values = {key: x.data_ptr() if isinstance(x, Tensor) else x for key, x in given.items()}
        arguments = self.structure(**values)
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            status = self.kernels(like.device.index).run(name, arguments, blocks, stream(like))
        if status != 0:
            raise RuntimeError(f"{self.op}: launching the CUDA kernel {name} failed with CUDA error {status}")


def stream(x: Tensor) -> int | None:
    """torch's current stream on the tensor's GPU; None on the CPU, where the tests run kernels."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def misfit(device: int | None = None) -> str | None:
    """None if the kernels are written for a GPU (its number, or the current one), else the reason and the remedy."""
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs, and the kernels are CUDA; take backend 'reference'"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch, or take backend 'cpu'"
    if reason := refusal()[0]:
        return f"torch cannot use the GPU here: {reason}; update the driver, or take backend 'cpu'"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no NVIDIA GPU or driver here; see nvidia-smi, or take backend 'cpu'"
    device = torch.cuda.current_device() if device is None else device
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and the "
            f"kernels need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere) or newer; take backend 'chunked'"
        )
    return None
