"""The arguments of kernels: which tensors those on the CPU take, the structure that passes them, and alignment."""

import ctypes
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor

Structure = TypeVar("Structure", bound=ctypes.Structure)
Given = TypeVar("Given", bound=Tensor | None)


def takes(first: Tensor, *others: Tensor | None) -> bool:
    """True if the kernels take these tensors (None: not given): real ones on the CPU, all float32 or all bfloat16."""
    return (
        first.is_cpu
        and first.dtype in (torch.float32, torch.bfloat16)
        and all([x is None or (x.dtype == first.dtype and x.is_cpu) for x in others])
        and first.numel() > 0
        and type(first) is Tensor  # not a fake one
    )


def fields(
    pointers: str, sizes: str, numbers: str = "", flags: str = "bfloat16 threads"
) -> list[tuple[str, type[ctypes._SimpleCData]]]:
    """The fields of a structure: names of pointers, of 64-bit sizes, of float32 numbers and of ints."""
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (numbers, ctypes.c_float), (flags, ctypes.c_int))
    return [(name, kind) for names, kind in kinds for name in names.split()]


def fill(structure: type[Structure], like: Tensor, tensors: Mapping[str, Tensor | None], **others: float) -> Structure:
    """A structure of `fields` for the dtype of `like`, given tensors by name (None: not given) and the `others`."""
    return structure(
        bfloat16=like.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        **others,
        **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
    )


def aligned(x: Given) -> Given:
    """x if it is aligned for the kernels' copies of 8 and 16 bytes, else a copy of it."""
    return x if x is None or x.data_ptr() % 16 == 0 else cast(Given, x.clone())
