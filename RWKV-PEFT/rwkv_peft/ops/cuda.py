"""The CUDA kernels as a wkv6 backend: builds cuda/wkv6_cuda.cu on first use and launches it on torch's stream.

nvcc makes a library with a C interface where it works; else NVRTC, which CUDA builds of torch bring along, makes a
module that the driver loads (cuda_nvrtc.py). Both take one structure, Arguments.
"""

import contextlib
import ctypes
import functools

import torch

from . import cuda_nvrtc
from .build import BuildError, Unit, build_library, find_program, source_directory

SEGMENT = 64  # steps between two saved states; wkv6_arguments.cuh's SEGMENT
OLDEST_CAPABILITY = (8, 0)  # the first with cp.async and bf16 products
HEADERS = ("ptx", "tile", "arguments", "chunk", "forward", "backward", "plain")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")

POINTERS = (
    *("r", "k", "v", "w", "u", "state", "bounds", "y", "final_state", "checkpoints"),
    *("gy", "gfinal", "gr", "gk", "gv", "gw", "gu", "gstate"),
)
INTEGERS = ("sequences", "length", "heads", "head_size", "scalar", "device")


class Arguments(ctypes.Structure):
    """wkv6_arguments.cuh's structure of the same name."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int) for name in INTEGERS]


class Library:
    """A compiled library's C interface: forward and backward(arguments, stream) -> CUDA's error code."""

    def __init__(self, path):
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"cannot load {path}: {error}; delete that file so that it is built anew") from error
        self.forward, self.backward = library.wkv6_forward, library.wkv6_backward
        for function in (self.forward, self.backward):
            function.argtypes = [ctypes.POINTER(Arguments), ctypes.c_void_p]


def unavailable():
    """None where the kernels work on the current GPU, else why they do not and what would help."""
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
    try:
        kernels(device)
    except BuildError as error:
        return str(error)
    return None


def checkpoint_count(tokens, sequences):
    """States kept for backward: one at each 64th step of a sequence, and a gap of at most one a sequence."""
    return tokens // SEGMENT + sequences


def forward(r, k, v, w, u, state, cu_seqlens, save, level):
    """Contiguous r k v w (B, T, H, N), float32 or bfloat16; u (H, N), state (n, H, N, N) or None, float32;
    cu_seqlens (n + 1,) int64 or None -> y, final state, checkpoints (float32, empty unless `save`)."""
    del level  # the CPU kernel's instruction set
    return run_forward(kernels(r.device.index), _stream(r), r, k, v, w, u, state, cu_seqlens, save)


def backward(r, k, v, w, u, state, cu_seqlens, checkpoints, gy, gfinal, level):
    """The gradients of r k v w u and state, given those of y and of the final state (either None for zeros)."""
    del state, level  # the first checkpoint is the state
    return run_backward(kernels(r.device.index), _stream(r), r, k, v, w, u, cu_seqlens, checkpoints, gy, gfinal)


def run_forward(kernels, stream, r, k, v, w, u, state, cu_seqlens, save):
    """forward, on the given kernels and stream."""
    B, T, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    final_state = u.new_empty(sequences, H, N, N)
    checkpoints = u.new_empty(checkpoint_count(B * T, sequences) if save else 0, H, N, N)
    r, k, v, w, state = (None if x is None else _aligned(x) for x in (r, k, v, w, state))
    tensors = dict(r=r, k=k, v=v, w=w, u=u, state=state, bounds=cu_seqlens, y=y, final_state=final_state)
    _launch(kernels.forward, stream, sequences, **tensors, checkpoints=checkpoints if save else None)
    return y, final_state, checkpoints


def run_backward(kernels, stream, r, k, v, w, u, cu_seqlens, checkpoints, gy, gfinal):
    """backward, on the given kernels and stream."""
    H, N = u.shape
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gy = torch.zeros_like(r) if gy is None else gy
    r, k, v, w, gy, gfinal = (None if x is None else _aligned(x) for x in (r, k, v, w, gy, gfinal))
    gr, gk, gv, gw = (torch.empty_like(x) for x in (r, k, v, w))
    gu = u.new_empty(sequences, H, N)
    gstate = u.new_empty(sequences, H, N, N)
    tensors = dict(r=r, k=k, v=v, w=w, u=u, bounds=cu_seqlens, checkpoints=checkpoints, gy=gy, gfinal=gfinal)
    gradients = dict(gr=gr, gk=gk, gv=gv, gw=gw, gu=gu, gstate=gstate)
    _launch(kernels.backward, stream, sequences, **tensors, **gradients)
    return gr, gk, gv, gw, gu.sum(0), gstate


def _launch(function, stream, sequences, **tensors):
    r = tensors["r"]
    B, T, H, N = r.shape
    if sequences == 0 or H == 0:
        return
    arguments = Arguments(
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
        sequences=sequences,
        length=T,
        heads=H,
        head_size=N,
        scalar=int(r.dtype == torch.bfloat16),
        device=r.device.index or 0,
    )
    with torch.cuda.device(r.device) if r.is_cuda else contextlib.nullcontext():
        status = function(ctypes.byref(arguments), stream)
    if status != 0:
        raise RuntimeError(f"wkv6: launching the CUDA kernel failed with CUDA error {status}")


def _aligned(x):
    """x where the kernels' copies of 8 and 16 bytes can read it, else a copy of it."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _stream(x):
    return torch.cuda.current_stream(x.device).cuda_stream


@functools.cache
def kernels(device):
    """The kernels for GPU number `device`, built on first use; BuildError where that fails (and is not cached)."""
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    try:
        return Library(build_library(f"wkv6_cuda_sm{capability}", *recipe(find_nvcc(), capability)))
    except BuildError:  # there is no nvcc, or it is too old for this GPU, or has no C++ compiler that it likes
        nvrtc = cuda_nvrtc.find_nvrtc()
        if nvrtc is None:
            raise
    image = cuda_nvrtc.cubin(f"sm_{capability}", headers(), nvrtc)
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes torch's context the thread's current one
        return cuda_nvrtc.Module(image)


def find_nvcc():
    """nvcc's path; BuildError where there is none."""
    return find_program(
        *("nvcc", "/usr/local/cuda/bin/nvcc"),
        remedy="install the CUDA toolkit and put its bin folder on PATH, or pip install nvidia-cuda-nvrtc",
    )


def recipe(compiler, architecture):
    """(units, link command, headers) of the library for one architecture: "80", "90", ..."""
    target = (compiler, f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    unit = Unit(source_directory() / "wkv6_cuda.cu", (*target, *NVCC_FLAGS))
    return [unit], (*target, "-shared", "-cudart", "static"), headers()


def headers():
    """What wkv6_cuda.cu includes."""
    return [source_directory() / f"wkv6_{name}.cuh" for name in HEADERS]
