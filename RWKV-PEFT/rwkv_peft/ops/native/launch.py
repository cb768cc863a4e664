"""From tensors to a launch of a recurrence's CUDA kernels: one structure for both directions, and torch's stream."""

import contextlib
import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .library import load

INTEGERS = ("sequences", "length", "heads", "head_size", "scalar", "device")


def structure_fields(pointers: Sequence[str]) -> list[tuple[str, type]]:
    """The fields of an arguments.cuh's Arguments: its pointers by name, then INTEGERS."""
    return [(name, ctypes.c_void_p) for name in pointers] + [(name, ctypes.c_int) for name in INTEGERS]


class Library:
    """A compiled library's C interface: forward and backward(arguments, stream) -> CUDA's error code."""

    def __init__(self, op: str, arguments: type[ctypes.Structure], path: str):
        signature = (ctypes.c_int, arguments, ctypes.c_void_p)
        library = load(path, (f"{op}_forward", *signature), (f"{op}_backward", *signature))
        self.forward, self.backward = getattr(library, f"{op}_forward"), getattr(library, f"{op}_backward")


def launch(
    op: str,
    function: Callable,
    stream: int | None,
    arguments: type[ctypes.Structure],
    sequences: int,
    tensors: dict[str, Tensor | None],
) -> None:
    """Enqueue `function` on `stream`, given a structure `arguments` of the tensors by name, r (B, T, H, N) among them.
    Raises RuntimeError where the launch fails."""
    r = tensors["r"]
    assert r is not None
    _, T, H, N = r.shape
    if sequences == 0 or H == 0:
        return
    filled = arguments(
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
        sequences=sequences,
        length=T,
        heads=H,
        head_size=N,
        scalar=int(r.dtype == torch.bfloat16),
        device=r.device.index or 0,
    )
    with torch.cuda.device(r.device) if r.is_cuda else contextlib.nullcontext():
        status = function(ctypes.byref(filled), stream)
    if status != 0:
        raise RuntimeError(f"{op}: launching the CUDA kernel failed with CUDA error {status}")


def aligned(x: Tensor | None) -> Tensor | None:
    """x where the kernels' copies of 8 and 16 bytes can read it, else a copy of it."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()


def stream(x: Tensor) -> int:
    """torch's current stream on the tensor's GPU."""
    return torch.cuda.current_stream(x.device).cuda_stream
