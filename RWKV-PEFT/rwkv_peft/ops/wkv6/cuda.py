"""The CUDA kernels as a wkv6 backend: cuda/wkv6."""

from ..native.cuda import Block
from ..recurrence.cuda import CudaRecurrence, Split
from .reference import SIGNATURE

STRIP = 16  # state elements of a thread in the plain kernels: STRIP of cuda/wkv6/plain.cuh
SCAN_BLOCK = 512  # elements of a state; cuda/wkv6/groups.cuh's 4 SCAN_THREADS
SPLIT = Split("wkv6_{}_groups_64", "wkv6_{}_scan", scan_blocks=64 * 64 // SCAN_BLOCK, on_small=2)


def plain_block(head_size: int) -> Block:
    """The threads per block of the plain kernels."""
    return head_size, -(-head_size // STRIP)


RECURRENCE = CudaRecurrence(SIGNATURE, 64, plain_block, SPLIT, halved=True)
FAMILY = RECURRENCE.family
