"""CUDA kernels without nvcc: compiled by NVRTC, CUDA's run-time compiler.

NVRTC comes with CUDA builds of torch (the nvidia-cuda-nvrtc wheels) or with the CUDA toolkit. It is called through
ctypes, so that nothing else needs to be installed.
"""

import ctypes
import hashlib
import importlib.util
from pathlib import Path

from .errors import BuildError
from .kept import cache_directory, content_of, make_once
from .sources import included_files, source_directory

SONAMES = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12")
OPTIONS = ("-std=c++17",)


def find_nvrtc() -> ctypes.CDLL | None:
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


def _wheel_libraries() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [path for folder in folders for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"))]


def cubin(name: str, source: str, architecture: str, nvrtc: ctypes.CDLL) -> bytes:
    """`source`, a path below cuda/, compiled by the library `nvrtc` for one architecture ("sm_90", ...), as bytes;
    cached by content under `name`."""
    root = source_directory("cuda")
    file = root / source
    digest = hashlib.sha256(" ".join((architecture, *OPTIONS)).encode())
    for path in (file, *included_files(file, root)):
        digest.update(path.read_bytes())
    cached = cache_directory() / f"{name}_{architecture}-{digest.hexdigest()[:16]}.cubin"

    def make(work: Path) -> Path:
        finished = work / cached.name
        finished.write_bytes(_compile(nvrtc, file, root, architecture))
        return finished

    try:
        make_once(cached, f"{name}_{architecture}", make)
        return content_of(cached)
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
