"""The CUDA kernels as a wkv6 backend: cuda/wkv6, and which of its kernels serves what."""

from functools import partial
from types import MappingProxyType

import torch

from ..native.kernels import Block
from ..recurrence.cuda import CudaRecurrence
from ..recurrence.groups import Split
from .signature import SIGNATURE

STRIP = 16  # state elements a thread in the plain kernels; cuda/wkv6/plain.cuh's STRIP
CHUNKED = tuple(f"wkv6_{direction}_{N}" for direction in ("forward", "backward") for N in (32, 64, 128))
GATED_SIZE = 64  # the head size of the kernels that make what follows, too
GATED = tuple(f"wkv6_{direction}_gated_{GATED_SIZE}" for direction in ("forward", "backward"))
RANKS = (64, 128)  # of the decay that they make there, too
DECAY = tuple(f"{name}_decay_{rank}" for name in GATED for rank in RANKS)
SCAN_BLOCK = 512  # elements of a state; cuda/wkv6/groups.cuh's 4 SCAN_THREADS
SPLITS = MappingProxyType(
    {
        N: Split(f"wkv6_{{}}_groups_{N}", "wkv6_{}_scan", N * N // SCAN_BLOCK, on_small=2 if N <= 64 else 1)
        for N in (32, 64, 128)
    }
)
PLAIN = tuple(f"wkv6_{way}_plain_{dtype}" for way in ("forward", "backward") for dtype in ("float32", "bfloat16"))


def plan(direction: str, head_size: int, dtype: torch.dtype) -> list[tuple[str, Block | None]]:
    """The kernel of a direction, "forward" or "backward", and its block."""
    chunked = f"wkv6_{direction}_{head_size}"
    if dtype == torch.bfloat16 and chunked in CHUNKED:
        return [(chunked, None)]
    scalar = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return [(f"wkv6_{direction}_plain_{scalar}", (head_size, -(-head_size // STRIP)))]


def plan_gated(direction: str, head_size: int, dtype: torch.dtype) -> list[tuple[str, Block | None]]:
    """The same where kernels make what follows, too, which those of bfloat16 and GATED_SIZE do."""
    assert head_size == GATED_SIZE and dtype == torch.bfloat16
    return [(f"wkv6_{direction}_gated_{head_size}", None)]


def plan_decay(rank: int, direction: str, head_size: int, dtype: torch.dtype) -> list[tuple[str, Block | None]]:
    """The same where they make the decay, too, of a rank among RANKS."""
    [(gated, block)] = plan_gated(direction, head_size, dtype)
    return [(f"{gated}_decay_{rank}", block)]


RECURRENCE = CudaRecurrence(SIGNATURE, 64, (*CHUNKED, *GATED, *DECAY, *PLAIN), plan, SPLITS, halved=(32, 64, 128))
WITH_GATE = RECURRENCE.variant(SIGNATURE.rows, plan_gated, SPLITS)
WITH_DECAY = MappingProxyType(  # by the decay's rank
    {rank: RECURRENCE.variant(SIGNATURE.rows, partial(plan_decay, rank), SPLITS) for rank in RANKS}
)
FAMILY = RECURRENCE.family
