"""The CUDA kernels as a wkv7 backend: builds cuda/wkv7 on first use and launches it on torch's stream.

nvcc makes a library with a C interface where it works; else NVRTC, which CUDA builds of torch bring along, makes a
module that the driver loads (nvrtc.py). Both take one structure, Arguments.
"""

import ctypes
import functools

import torch

from ..native import gpu, launch
from ..native.errors import BuildError
from ..native.launch import aligned, stream
from .nvrtc import Module

SOURCE = "wkv7/wkv7.cu"
SEGMENT = 32  # steps that share a slot among the checkpoints; cuda/wkv7/arguments.cuh's SEGMENT

POINTERS = (
    *("r", "w", "k", "v", "a", "b", "state", "bounds", "y", "final_state", "checkpoints"),
    *("gy", "gfinal", "gr", "gw", "gk", "gv", "ga", "gb", "gstate"),
)


class Arguments(ctypes.Structure):
    """cuda/wkv7/arguments.cuh's structure of the same name."""

    _fields_ = launch.structure_fields(POINTERS)


# A compiled library's C interface, given its path.
Library = functools.partial(launch.Library, "wkv7", Arguments)


def unavailable(level: str = "") -> str | None:
    """None where the kernels work on the current GPU, else why they do not and what would help."""
    del level  # the CPU kernel's instruction set
    reason = gpu.unavailable()
    if reason is not None:
        return reason
    try:
        kernels(torch.cuda.current_device())
    except BuildError as error:
        return str(error)
    return None


def checkpoint_count(tokens: int, rows: int, sequences: int) -> int:
    """Slots of states kept for backward: one for each 32 steps of a sequence, and a gap of at most one a sequence."""
    return tokens // SEGMENT + sequences


def forward(r, w, k, v, a, b, state, cu_seqlens, save, level):
    """Contiguous r w k v a b (B, T, H, N), float32 or bfloat16; state (n, H, N, N) or None, float32;
    cu_seqlens (n + 1,) int64 or None -> y, final state, checkpoints (in float32's size, empty unless `save`)."""
    return run_forward(kernels(r.device.index), stream(r), r, w, k, v, a, b, state, cu_seqlens, save)


def backward(r, w, k, v, a, b, state, cu_seqlens, checkpoints, gy, gfinal, level):
    """The gradients of r w k v a b and state, given those of y and of the final state (either None for zeros)."""
    inputs = (r, w, k, v, a, b)  # the first checkpoint is the state
    return run_backward(kernels(r.device.index), stream(r), *inputs, cu_seqlens, checkpoints, gy, gfinal)


def run_forward(kernels, stream, r, w, k, v, a, b, state, cu_seqlens, save):
    """forward, on the given kernels and stream."""
    B, T, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    count = checkpoint_count(B * T, B, sequences) if save else 0
    final_state, checkpoints = (r.new_empty(n, H, N, N, dtype=torch.float32) for n in (sequences, count))
    r, w, k, v, a, b, state = (aligned(x) for x in (r, w, k, v, a, b, state))
    tensors = dict(r=r, w=w, k=k, v=v, a=a, b=b, state=state, bounds=cu_seqlens, y=y, final_state=final_state)
    tensors["checkpoints"] = checkpoints if save else None
    launch.launch("wkv7", kernels.forward, stream, Arguments, sequences, tensors)
    return y, final_state, checkpoints


def run_backward(kernels, stream, r, w, k, v, a, b, cu_seqlens, checkpoints, gy, gfinal):
    """backward, on the given kernels and stream."""
    _, _, H, N = r.shape
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gy = torch.zeros_like(r) if gy is None else gy
    r, w, k, v, a, b, gy, gfinal = (aligned(x) for x in (r, w, k, v, a, b, gy, gfinal))
    gradients = [torch.empty_like(x) for x in (r, w, k, v, a, b)]
    gradients.append(r.new_empty(sequences, H, N, N, dtype=torch.float32))
    tensors = dict(r=r, w=w, k=k, v=v, a=a, b=b, bounds=cu_seqlens, checkpoints=checkpoints, gy=gy, gfinal=gfinal)
    tensors |= dict(zip("gr gw gk gv ga gb gstate".split(), gradients))
    launch.launch("wkv7", kernels.backward, stream, Arguments, sequences, tensors)
    return tuple(gradients)


@functools.cache
def kernels(device):
    """The kernels for GPU number `device`, built on first use; BuildError where that fails (and is not cached)."""

    def trial(kernels):
        x = torch.zeros(1, 1, 1, 32, device=device)
        with torch.cuda.device(device):
            run_forward(kernels, stream(x), x, x, x, x, x, x, None, None, False)
            torch.cuda.synchronize()

    return gpu.build_kernels("wkv7_cuda", SOURCE, device, Library, Module, trial)
