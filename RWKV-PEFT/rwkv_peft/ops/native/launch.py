"""Aligns tensors for a CUDA kernel."""

from typing import overload

from torch import Tensor


@overload
def aligned(x: Tensor) -> Tensor: ...


@overload
def aligned(x: None) -> None: ...


def aligned(x: Tensor | None) -> Tensor | None:
    """x if it is aligned for the kernels' copies of 8 and 16 bytes, else a copy of it."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()
