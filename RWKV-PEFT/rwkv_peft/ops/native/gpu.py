"""From a family's CUDA source to kernels on a GPU: a library by nvcc where it works, else a module by NVRTC."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from . import nvrtc
from .build import Unit, build_library
from .compilers import find_nvcc
from .errors import BuildError
from .sources import included_files, source_directory

Built = TypeVar("Built")
OLDEST_CAPABILITY = (8, 0)  # the first with cp.async and bf16 products
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")


def unavailable() -> str | None:
    """None where there is a GPU that the kernels are written for, else why not and what would help."""
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs, and the kernels are CUDA; take backend 'reference'"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch, or take backend 'cpu'"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no NVIDIA GPU or driver here; see nvidia-smi, or take backend 'cpu'"
    device = torch.cuda.current_device()
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and the "
            f"kernels need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere) or newer; take backend 'reference'"
        )
    return None


def build_kernels(
    name: str,
    source: str,
    device: int,
    from_library: Callable[[Path], Built],
    from_image: Callable[[bytes], Built],
    trial: Callable[[Built], object],
) -> Built:
    """The kernels of `source`, a path below cuda/, for GPU number `device`.

    from_library(path) where nvcc compiles them, else from_image(cubin) with the GPU's context current. trial(kernels)
    launches one and raises RuntimeError where that fails. Raises BuildError where neither works.
    """
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    try:
        library = build_library(f"{name}_sm{capability}", *recipe(source, find_nvcc(), capability))
        return _tried(from_library(library), trial, "nvcc's code; it may be newer than the driver")
    except BuildError:  # there is no nvcc, or it does not fit this GPU, its driver or the C++ compiler
        compiler = nvrtc.find_nvrtc()
        if compiler is None:
            raise
    image = nvrtc.cubin(name, source, f"sm_{capability}", compiler)
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes torch's context the thread's current one
        return _tried(from_image(image), trial, "NVRTC's code")


def _tried(kernels: Built, trial: Callable[[Built], object], whose: str) -> Built:
    """kernels, after a launch that worked."""
    try:
        trial(kernels)
    except RuntimeError as error:
        raise BuildError(f"{error} ({whose}); see nvidia-smi for the driver's version and state") from error
    return kernels


def recipe(source: str | Path, nvcc: str, architecture: str) -> tuple[list[Unit], tuple[str, ...], list[Path]]:
    """(units, link command, headers) of a library for one architecture: "80", "90", ...; source: a path below cuda/, or
    a whole one."""
    root = source_directory("cuda")
    target = (nvcc, f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    unit = Unit(root / source, (*target, *NVCC_FLAGS, f"-I{root}"))
    return [unit], (*target, "-shared", "-cudart", "static"), included_files(unit.source, root)
