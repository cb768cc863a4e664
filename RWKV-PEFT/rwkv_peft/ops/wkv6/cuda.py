"""The CUDA kernels as a wkv6 backend: builds cuda/wkv6 on first use and launches it on torch's stream.

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

SOURCE = "wkv6/wkv6.cu"
SEGMENT = 64  # steps between two saved states; cuda/wkv6/arguments.cuh's SEGMENT

POINTERS = (
    *("r", "k", "v", "w", "u", "state", "bounds", "y", "final_state", "checkpoints"),
    *("gy", "gfinal", "gr", "gk", "gv", "gw", "gu", "gstate"),
)


class Arguments(ctypes.Structure):
    """cuda/wkv6/arguments.cuh's structure of the same name."""

    _fields_ = launch.structure_fields(POINTERS)


# A compiled library's C interface, given its path.
Library = functools.partial(launch.Library, "wkv6", Arguments)


def unavailable():
    """None where the kernels work on the current GPU, else why they do not and what would help."""
    reason = gpu.unavailable()
    if reason is not None:
        return reason
    try:
        kernels(torch.cuda.current_device())
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
    return run_forward(kernels(r.device.index), stream(r), r, k, v, w, u, state, cu_seqlens, save)


def backward(r, k, v, w, u, state, cu_seqlens, checkpoints, gy, gfinal, level):
    """The gradients of r k v w u and state, given those of y and of the final state (either None for zeros)."""
    del state, level  # the first checkpoint is the state
    return run_backward(kernels(r.device.index), stream(r), r, k, v, w, u, cu_seqlens, checkpoints, gy, gfinal)


def run_forward(kernels, stream, r, k, v, w, u, state, cu_seqlens, save):
    """forward, on the given kernels and stream."""
    B, T, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    final_state = u.new_empty(sequences, H, N, N)
    checkpoints = u.new_empty(checkpoint_count(B * T, sequences) if save else 0, H, N, N)
    r, k, v, w, state = (aligned(x) for x in (r, k, v, w, state))
    tensors = dict(r=r, k=k, v=v, w=w, u=u, state=state, bounds=cu_seqlens, y=y, final_state=final_state)
    tensors["checkpoints"] = checkpoints if save else None
    launch.launch("wkv6", kernels.forward, stream, Arguments, sequences, tensors)
    return y, final_state, checkpoints


def run_backward(kernels, stream, r, k, v, w, u, cu_seqlens, checkpoints, gy, gfinal):
    """backward, on the given kernels and stream."""
    H, N = u.shape
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gy = torch.zeros_like(r) if gy is None else gy
    r, k, v, w, gy, gfinal = (aligned(x) for x in (r, k, v, w, gy, gfinal))
    gr, gk, gv, gw = (torch.empty_like(x) for x in (r, k, v, w))
    gu = u.new_empty(sequences, H, N)
    gstate = u.new_empty(sequences, H, N, N)
    tensors = dict(r=r, k=k, v=v, w=w, u=u, bounds=cu_seqlens, checkpoints=checkpoints, gy=gy, gfinal=gfinal)
    gradients = dict(gr=gr, gk=gk, gv=gv, gw=gw, gu=gu, gstate=gstate)
    launch.launch("wkv6", kernels.backward, stream, Arguments, sequences, tensors | gradients)
    return gr, gk, gv, gw, gu.sum(0), gstate


@functools.cache
def kernels(device):
    """The kernels for GPU number `device`, built on first use; BuildError where that fails (and is not cached)."""

    def trial(kernels):
        x, u = torch.zeros(1, 1, 1, 32, device=device), torch.zeros(1, 32, device=device)
        with torch.cuda.device(device):
            run_forward(kernels, stream(x), x, x, x, x, u, None, None, False)
            torch.cuda.synchronize()

    return gpu.build_kernels("wkv6_cuda", SOURCE, device, Library, Module, trial)
