"""The CUDA kernels as a wkv7 backend: cuda/wkv7."""

from ..native.cuda import Block
from ..recurrence.cuda import CudaRecurrence, Split
from .reference import SIGNATURE

STRIP = 16  # state elements of a thread in the plain kernels: STRIP of cuda/wkv7/plain.cuh
SPLIT = Split("wkv7_{}_groups_64", "wkv7_{}_scan_64", scan_blocks=4)


def plain_block(head_size: int) -> Block:
    """The threads per block of the plain kernels."""
    strips = 1  # threads beside each other on a row: a power of two, so that warps are whole
    while strips * STRIP < head_size:
        strips *= 2
    rows = 32 // strips  # rows of a warp
    return strips, -(-head_size // rows) * rows


RECURRENCE = CudaRecurrence(SIGNATURE, 32, plain_block, SPLIT)
FAMILY = RECURRENCE.family
