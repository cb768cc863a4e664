"""The CUDA kernels as a wkv7 backend: cuda/wkv7, and which kernel serves which head size and dtype."""

from types import MappingProxyType

import torch

from ..native.kernels import Block
from ..recurrence.cuda import CudaRecurrence
from ..recurrence.groups import Split
from .signature import SIGNATURE

STRIP = 16  # state elements of a thread in the plain kernels: STRIP of cuda/wkv7/plain.cuh
CHUNKED_SIZE = 64  # the head size of the chunked kernels
CHUNKED = ("wkv7_forward_64", "wkv7_backward_64")
SPLITS = MappingProxyType({64: Split("wkv7_{}_groups_64", "wkv7_{}_scan_64", scan_blocks=4)})  # by head size
KEYS = ("wkv7_forward_keys_64", "wkv7_backward_keys_64")  # chunked kernels that make k, a and b themselves
KEYS_SPLITS = MappingProxyType({64: Split("wkv7_{}_groups_keys_64", "wkv7_{}_scan_64", scan_blocks=4)})
PLAIN = tuple(f"wkv7_{way}_plain_{dtype}" for way in ("forward", "backward") for dtype in ("float32", "bfloat16"))


def plan(direction: str, head_size: int, dtype: torch.dtype) -> list[tuple[str, Block | None]]:
    """The kernel of a direction, and its threads per block."""
    chunked = f"wkv7_{direction}_{head_size}"
    if dtype == torch.bfloat16 and chunked in CHUNKED:
        return [(chunked, None)]
    strips = 1  # threads beside each other on a row: a power of two, so that warps are whole
    while strips * STRIP < head_size:
        strips *= 2
    rows = 32 // strips  # rows of a warp
    scalar = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return [(f"wkv7_{direction}_plain_{scalar}", (strips, -(-head_size // rows) * rows))]


def plan_with_keys(direction: str, head_size: int, dtype: torch.dtype) -> list[tuple[str, Block | None]]:
    """The same for the kernels that make k, a and b, which need bfloat16 and CHUNKED_SIZE."""
    assert head_size == CHUNKED_SIZE and dtype == torch.bfloat16
    return [(f"wkv7_{direction}_keys_{head_size}", None)]


NAMES = (*CHUNKED, *PLAIN, *KEYS, *KEYS_SPLITS[CHUNKED_SIZE].names())
RECURRENCE = CudaRecurrence(SIGNATURE, 32, NAMES, plan, SPLITS)
WITH_KEYS = RECURRENCE.variant(("r", "w", "k", "v", "low"), plan_with_keys, KEYS_SPLITS)
FAMILY = RECURRENCE.family
