"""Prepares a launch of a CUDA kernel: alignment of tensors, and torch's stream."""

from typing import overload

import torch
from torch import Tensor


@overload
def aligned(x: Tensor) -> Tensor: ...


@overload
def aligned(x: None) -> None: ...


def aligned(x: Tensor | None) -> Tensor | None:
    """x if it is aligned for the kernels' copies of 8 and 16 bytes, else a copy of it."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()


def stream(x: Tensor) -> int | None:
    """torch's current stream on the tensor's GPU; None on the CPU, where the tests run kernels."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
