"""Compiles CUDA kernels by NVRTC, CUDA's run-time compiler.

NVRTC comes with CUDA builds of torch (the nvidia-cuda-nvrtc wheels) or with the CUDA toolkit. It is called through
ctypes, so that nothing else needs to be installed.
"""

import ctypes
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from .kept import SEAL, cache_directory, make_once
from .library import BuildError
from .sources import included_files, source_directory

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
        same major version, whose code it runs too. BuildError if there is none."""
        major, minor = capability
        own = f"{major}{minor}"
        older = [f"{major}{n}" for n in reversed(range(minor)) if f"{major}{n}" not in JETSON and own not in JETSON]
        found = next((architecture for architecture in (own, *older) if architecture in self.architectures), None)
        if found is None:
            raise BuildError(
                f"it does not compile for compute capability {major}.{minor}; install a newer CUDA, with the build of "
                "torch that belongs to it"
            )
        return found


def compilers() -> Iterator[Nvrtc]:
    """Every NVRTC of this machine, from the nvidia wheels and the system, each version once.

    Those with the major version of torch's CUDA come first: the driver runs torch, and so takes their code, but may be
    too old for a newer compiler's.
    """
    of_torch = f".so.{(torch.version.cuda or '').partition('.')[0]}"
    seen = set()
    for path in sorted([*map(str, _wheel_libraries()), *SONAMES], key=lambda path: not path.endswith(of_torch)):
        compiler = _load(path)
        if compiler is not None and compiler.version not in seen:
            seen.add(compiler.version)
            yield compiler


def _load(path: str) -> Nvrtc | None:
    """The NVRTC at a path, or by a bare name that the system finds; None if it cannot be loaded, or is older than CUDA
    11.2 and so cannot list its architectures."""
    try:
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else ():
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by its bare name
        return Nvrtc(ctypes.CDLL(path))
    except (OSError, AttributeError):
        return None


def _wheel_libraries() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [path for folder in folders for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"))]


def cubin(name: str, source: str, architecture: str, compiler: Nvrtc, anew: bool = False) -> bytes:
    """Compile `source`, a path below cuda/, by one NVRTC for one architecture ("sm_90", ...) -> the cubin's bytes.

    Cached under `name` by content and by the compiler's version, because a driver may refuse a newer compiler's code;
    anew: compile even if it is in the cache.
    """
    root = source_directory("cuda")
    file = root / source
    digest = hashlib.sha256(" ".join((architecture, compiler.version, *OPTIONS)).encode())
    for path in (file, *included_files(file, root)):
        digest.update(path.read_bytes())
    cached = cache_directory() / f"{name}_{architecture}-{digest.hexdigest()[:16]}.cubin"

    def make(work: Path) -> Path:
        finished = work / cached.name
        finished.write_bytes(_compile(compiler.library, file, root, architecture))
        return finished

    try:
        if anew:
            cached.unlink(missing_ok=True)
        make_once(cached, f"{name}_{architecture}", make)
        return cached.read_bytes()[:-SEAL]
    except OSError as error:
        raise BuildError(
            f"cannot keep the CUDA kernels at {cached}: {error}; make that folder writable, or point XDG_CACHE_HOME "
            "elsewhere"
        ) from error


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
