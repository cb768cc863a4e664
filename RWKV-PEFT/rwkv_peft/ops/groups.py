"""Whether a recurrence's CUDA kernels split time, and into what: with few heads, each walked by a block of its own,
most of a GPU would idle (cuda/wkv6/groups.cuh, cuda/wkv7/groups.cuh)."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

GRAIN = 64  # a group is a multiple of so many tokens, which two saved states and the chunks divide
LEAST_TOKENS = 128  # of a group: fewer do not pay for three launches instead of one
# A sequence's groups, fewer of which do not pay: by the model of benchmarks/README.md, to find the states takes half of
# the time that the kernels themselves take, and a block that shares its multiprocessor 1.4 times as long.
LEAST_GROUPS = 3
# Blocks of these kernels that a multiprocessor holds, by its shared memory: 164 KB or more, else 100 KB.
RESIDENT, RESIDENT_SMALL = 2, 1
SMALL = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Split:
    """What comes before a recurrence's own kernels of a head size where time is split: a pass over all groups by their
    states alone, one block each, and a scan over each sequence's. Both take bfloat16."""

    groups: str  # the kernel's name with {} for "forward" or "backward", as is the scan's
    groups_threads: int
    scan: str
    scan_threads: int
    scan_blocks: int  # a sequence's head

    def names(self) -> list[str]:
        """Every kernel's."""
        return [name.format(way) for way in ("forward", "backward") for name in (self.groups, self.scan)]

    def launches(
        self, direction: str, heads: int, sequences: int, groups: int
    ) -> list[tuple[str, int, tuple[int, int]]]:
        """The kernel, the blocks and a block's (x, y) threads of both."""
        scan_blocks = heads * sequences * self.scan_blocks
        return [
            (self.groups.format(direction), heads * groups, (self.groups_threads, 1)),
            (self.scan.format(direction), scan_blocks, (self.scan_threads, 1)),
        ]


def group_of(r: Tensor, sequences: int) -> int:
    """The tokens of a group where to split r (B, T, H, N), B rows or one row of packed sequences, pays, else 0."""
    if not r.is_cuda or r.dtype != torch.bfloat16:
        return 0
    B, T, H, _ = r.shape
    return choose_group(B, T, H, sequences, resident_blocks(r.device.index or 0))


def choose_group(B: int, T: int, H: int, sequences: int, resident: int) -> int:
    """group_of, for a GPU that holds `resident` blocks at once. Packed sequences are taken to be alike."""
    groups = resident // (H * sequences)  # of each
    if groups < LEAST_GROUPS:
        return 0
    # Of packed sequences each may leave a place unused.
    tokens = -(-T // groups) if sequences == B else -(-T // ((groups - 1) * sequences))
    group = max(LEAST_TOKENS, -(-tokens // GRAIN) * GRAIN)
    return 0 if (LEAST_GROUPS - 1) * group * sequences >= B * T else group


def places(B: int, T: int, sequences: int, group: int) -> int:
    """How many groups there may be: in B rows of T tokens, or one row of packed `sequences`, of which each may leave a
    place unused; none where `group` is 0."""
    if not group:
        return 0
    return B * -(-T // group) if sequences == B else T // group + sequences


@functools.cache
def resident_blocks(device: int) -> int:
    """How many blocks GPU number `device` holds at once."""
    properties = torch.cuda.get_device_properties(device)
    small = (properties.major, properties.minor) in SMALL
    return properties.multi_processor_count * (RESIDENT_SMALL if small else RESIDENT)
