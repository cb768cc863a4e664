"""Whether a recurrence's CUDA kernels split time, and into what: with few heads, each walked by a block of its own,
most of a GPU would idle (cuda/wkv6/groups.cuh, cuda/wkv7/groups.cuh)."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

GRAIN = 64  # a group is a multiple of so many tokens, which two saved states and the chunks divide
LEAST_TOKENS = 128  # of a group: fewer do not pay for three launches instead of one
# The fewest groups of a sequence that pay: by count (docs/benchmarks/gpus.md), finding the states takes half of the
# time that the kernels themselves take, and a block that shares its multiprocessor takes 1.4 times as long.
LEAST_GROUPS = 3
RESIDENT = 2  # blocks of a multiprocessor, with which it hides most of what one waits for
SMALL = (
    (8, 6),
    (8, 7),
    (8, 9),
    (12, 0),
    (12, 1),
)  # capabilities with 100 KB of shared memory, others have 164 KB or more


@dataclass(frozen=True)
class Split:
    """What comes before a recurrence's own kernels of a head size where time is split: a pass over all groups by their
    states alone, one block each, and a scan over each sequence's. Both take bfloat16."""

    groups: str  # the kernel's name with {} for "forward" or "backward", as is the scan's
    scan: str
    scan_blocks: int  # a sequence's head
    on_small: int = 1  # blocks of the recurrence's own kernels that a multiprocessor with 100 KB of shared memory holds

    def names(self) -> list[str]:
        """Every kernel's."""
        return [name.format(way) for way in ("forward", "backward") for name in (self.groups, self.scan)]

    def launches(self, direction: str, heads: int, sequences: int, groups: int) -> list[tuple[str, int]]:
        """The kernel and the blocks of both."""
        return [
            (self.groups.format(direction), heads * groups),
            (self.scan.format(direction), heads * sequences * self.scan_blocks),
        ]


def group_of(r: Tensor, sequences: int, split: Split) -> int:
    """The tokens of a group where to split r (B, T, H, N), B rows or one row of packed sequences, pays, else 0."""
    if not r.is_cuda or r.dtype != torch.bfloat16:
        return 0
    B, T, H, _ = r.shape
    return choose_group(B, T, H, sequences, resident_blocks(r.device.index or 0, split.on_small))


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
def resident_blocks(device: int, on_small: int) -> int:
    """How many blocks GPU number `device` is to hold at once, given Split's on_small."""
    properties = torch.cuda.get_device_properties(device)
    small = (properties.major, properties.minor) in SMALL
    return properties.multi_processor_count * (on_small if small else RESIDENT)
