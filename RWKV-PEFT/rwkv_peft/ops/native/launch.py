"""Aligns tensors for a CUDA kernel."""

from typing import TypeVar, cast

from torch import Tensor

Given = TypeVar("Given", bound=Tensor | None)


def aligned(x: Given) -> Given:
    """x if it is aligned for the kernels' copies of 8 and 16 bytes, else a copy of it."""
    return x if x is None or x.data_ptr() % 16 == 0 else cast(Given, x.clone())
