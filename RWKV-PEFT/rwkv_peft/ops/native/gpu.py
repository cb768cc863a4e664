"""Compiles and loads a family's CUDA source for a GPU: a library by nvcc if that works, else a module by NVRTC."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ...gpus import refusal
from . import nvrtc
from .build import Recipe, build_library
from .compilers import architecture_for, find_nvcc, nvcc_architectures
from .library import BuildError
from .sources import included_files, source_directory

Built = TypeVar("Built")
OLDEST_CAPABILITY = (8, 0)  # the first with cp.async and bf16 products
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")


def unavailable(device: int | None = None) -> str | None:
    """None if the kernels are written for a GPU (its number, or the current one), else the reason and the remedy."""
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs, and the kernels are CUDA; take backend 'reference'"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch, or take backend 'cpu'"
    if words := refusal():
        return f"torch cannot use the GPU here: {words}; update the driver, or take backend 'cpu'"
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


def build_kernels(
    name: str,
    source: str,
    device: int,
    from_library: Callable[[Path], Built],
    from_image: Callable[[bytes], Built],
    trial: Callable[[Built], object],
) -> Built:
    """The kernels of `source`, a path below cuda/, for GPU number `device`.

    from_library(path) loads nvcc's result; if nvcc does not work, from_image(cubin) loads that of one NVRTC after
    another, with the GPU's context current. trial(kernels) launches one and raises RuntimeError if that fails. Raises
    BuildError, with the reason of each compiler, if none works.
    """
    reasons = []
    try:
        nvcc, architecture = nvcc_for(device)
        library = build_library(f"{name}_sm{architecture}", recipe(source, nvcc, architecture))
        return _tried(from_library(library), trial, "nvcc's code; it may be newer than the driver")
    except BuildError as error:  # there is no nvcc, or it does not fit this GPU, its driver or the C++ compiler
        reasons.append(str(error))
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes torch's context the thread's current one
        for compiler in nvrtc.compilers():
            try:
                return _tried(_module(name, source, device, compiler, from_image), trial, f"NVRTC {compiler.version}")
            except BuildError as error:
                reasons.append(str(error))
    raise BuildError("\n".join(reasons))


def nvcc_for(device: int) -> tuple[str, str]:
    """(nvcc, the architecture to compile for) for GPU number `device`. Raises BuildError if there is none."""
    nvcc, capability = find_nvcc(), torch.cuda.get_device_capability(device)
    return nvcc, architecture_for(capability, nvcc_architectures(nvcc), "nvcc")


def nvrtc_architecture(device: int, compiler: nvrtc.Nvrtc) -> str:
    """The architecture, "sm_90", ..., that an NVRTC should compile for on GPU number `device`. Raises BuildError."""
    capability = torch.cuda.get_device_capability(device)
    return "sm_" + architecture_for(capability, compiler.architectures, f"NVRTC {compiler.version}")


def _module(name: str, source: str, device: int, compiler: nvrtc.Nvrtc, from_image: Callable[[bytes], Built]) -> Built:
    """from_image(cubin of `source` by one NVRTC). Code that does not load is compiled anew once, because the cache may
    hold that of another release with the same version."""
    given = name, source, nvrtc_architecture(device, compiler), compiler
    image = nvrtc.cubin(*given)
    try:
        return from_image(image)
    except BuildError:
        return from_image(nvrtc.cubin(*given, anew=True))


def _tried(kernels: Built, trial: Callable[[Built], object], whose: str) -> Built:
    """Return the kernels after a trial launch. Raises BuildError if it fails."""
    try:
        trial(kernels)
    except RuntimeError as error:
        raise BuildError(f"{error} ({whose}); see nvidia-smi for the driver's version and state") from error
    return kernels


def recipe(source: str | Path, nvcc: str, architecture: str) -> Recipe:
    """The Recipe of a library for one architecture: "80", "90", …; source: a path below cuda/, or an absolute one."""
    root = source_directory("cuda")
    file, target = root / source, (nvcc, f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    compiling = (*target, *NVCC_FLAGS, f"-I{root}")
    return Recipe(file, compiling, (*target, "-shared", "-cudart", "static"), included_files(file, root))
