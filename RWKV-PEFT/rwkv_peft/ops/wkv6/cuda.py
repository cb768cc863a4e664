"""The CUDA kernels as a wkv6 backend: cuda/wkv6, and which kernel serves which head size and dtype."""

from types import MappingProxyType

import torch

from ..native.kernels import Block
from ..recurrence.cuda import CudaRecurrence
from ..recurrence.groups import Split
from .signature import SIGNATURE

STRIP = 16  # state elements of a thread in the plain kernels: STRIP of cuda/wkv6/plain.cuh
CHUNKED = ("wkv6_forward_64", "wkv6_backward_64")
SCAN_BLOCK = 512  # elements of a state; cuda/wkv6/groups.cuh's 4 SCAN_THREADS
SPLITS = MappingProxyType(
    {64: Split("wkv6_{}_groups_64", "wkv6_{}_scan", scan_blocks=64 * 64 // SCAN_BLOCK, on_small=2)}  # by head size
)
PLAIN = tuple(f"wkv6_{way}_plain_{dtype}" for way in ("forward", "backward") for dtype in ("float32", "bfloat16"))


def plan(direction: str, head_size: int, dtype: torch.dtype) -> list[tuple[str, Block | None]]:
    """The kernel of a direction, "forward" or "backward", and its threads per block."""
    chunked = f"wkv6_{direction}_{head_size}"
    if dtype == torch.bfloat16 and chunked in CHUNKED:
        return [(chunked, None)]
    scalar = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return [(f"wkv6_{direction}_plain_{scalar}", (head_size, -(-head_size // STRIP)))]


RECURRENCE = CudaRecurrence(SIGNATURE, 64, (*CHUNKED, *PLAIN), plan, SPLITS, halved=(64,))
FAMILY = RECURRENCE.family
