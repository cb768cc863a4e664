"""Decides if a recurrence's CUDA kernels split time, and into which groups: with few heads, and one block for each,
most of a GPU would idle (cuda/wkv6/groups.cuh, cuda/wkv7/groups.cuh)."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

GRAIN = 64  # a group is a multiple of so many tokens, and so of the chunks and of the distance between saved states
LEAST_TOKENS = 128  # the fewest tokens of a group; with fewer, three launches instead of one do not pay
# The fewest groups of a sequence that pay: by count (docs/benchmarks/gpus.md), finding the states takes half as long as
# the kernels themselves, and a block that shares its multiprocessor takes 1.4 times as long.
LEAST_GROUPS = 3
RESIDENT = 2  # blocks of a multiprocessor: while one waits, the other computes
SMALL = (
    (8, 6),
    (8, 7),
    (8, 9),
    (12, 0),
    (12, 1),
)  # capabilities with 100 KB of shared memory, others have 164 KB or more


@dataclass(frozen=True)
class Split:
    """The kernels that run before a recurrence's own, for one head size, if time is split: a pass over all groups that
    computes only their states, one block each, and a scan over each sequence's groups. Both take bfloat16."""

    groups: str  # the pass's name, with {} for "forward" or "backward"
    scan: str  # the scan's name, likewise
    scan_blocks: int  # blocks of the scan for each head of a sequence
    on_small: int = 1  # blocks of the recurrence's own kernels that a multiprocessor with 100 KB of shared memory holds

    def names(self) -> list[str]:
        """The names of all kernels."""
        return [name.format(way) for way in ("forward", "backward") for name in (self.groups, self.scan)]

    def launches(self, direction: str, heads: int, sequences: int, groups: int) -> list[tuple[str, int]]:
        """(kernel, number of blocks) of both."""
        return [
            (self.groups.format(direction), heads * groups),
            (self.scan.format(direction), heads * sequences * self.scan_blocks),
        ]


def group_of(r: Tensor, sequences: int, split: Split) -> int:
    """The tokens of a group if splitting r (B, T, H, N), B rows or one row of packed sequences, pays, else 0."""
    if not r.is_cuda or r.dtype != torch.bfloat16:
        return 0
    B, T, H, _ = r.shape
    return choose_group(B, T, H, sequences, resident_blocks(r.device.index or 0, split.on_small))


def choose_group(B: int, T: int, H: int, sequences: int, resident: int) -> int:
    """group_of for a GPU that holds `resident` blocks at once. Assumes that packed sequences are of one length."""
    groups = resident // (H * sequences)  # of each sequence
    if groups < LEAST_GROUPS:
        return 0
    # Each packed sequence may leave a place unused.
    tokens = -(-T // groups) if sequences == B else -(-T // ((groups - 1) * sequences))
    group = max(LEAST_TOKENS, -(-tokens // GRAIN) * GRAIN)
    return 0 if (LEAST_GROUPS - 1) * group * sequences >= B * T else group


def places(B: int, T: int, sequences: int, group: int) -> int:
    """The most groups in B rows of T tokens, or in one row of packed `sequences`, each of which may leave a place
    unused; 0 if `group` is 0."""
    if not group:
        return 0
    return B * -(-T // group) if sequences == B else T // group + sequences


@functools.cache
def resident_blocks(device: int, on_small: int) -> int:
    """The number of blocks to keep on GPU number `device` at once, given Split's on_small."""
    properties = torch.cuda.get_device_properties(device)
    small = (properties.major, properties.minor) in SMALL
    return properties.multi_processor_count * (on_small if small else RESIDENT)
