"""What adapters before a norm leave for it to add: parts (n, T, r) of a shift, whose sum is added to each shard of r
channels.

On a GPU the norm's kernels add it, and give its gradient, the sum over shards of what they write; here it is in plain
torch, with what launches are told of it.
"""

from typing import Any

from torch import Tensor

from . import cuda


def repeated(low: Tensor, width: int) -> Tensor:
    """(T, r) along the channels, cut: (T, width)."""
    return low.repeat(1, -(-width // low.shape[-1]))[:, :width]


def plus_left(x: Tensor, left: Tensor | None) -> Tensor:
    """x (…, C) and what was left of it (n, T, r), or None for nothing -> their sum (…, C)."""
    return x if left is None else x + repeated(left.sum(0), x.shape[-1]).view(x.shape)


def takes(channels: int, rank: int) -> bool:
    """Whether norms' kernels add shifts of a rank to so many channels."""
    return rank in cuda.SHARDS and channels % rank == 0 and channels <= cuda.MOST_MIXED


def alike(*lefts: Tensor | None) -> list[Tensor | None]:
    """These in one number of parts, as a launch has them: summed where they differ."""
    if len({len(left) for left in lefts if left is not None}) < 2:
        return list(lefts)
    return [None if left is None else left.sum(0, keepdim=True) for left in lefts]


def fit(x: Tensor, *lefts: Tensor | None) -> bool:
    """Whether they take these, or None each: of one shape."""
    given = [left for left in lefts if left is not None]
    return all([left.shape == given[0].shape and takes(x.shape[-1], left.shape[-1]) for left in given])


def sizes_of(*lefts: Tensor | None) -> dict[str, Any]:
    """What a launch is told of lefts that fit, or None each."""
    return next((dict(parts=len(left), shard=left.shape[-1]) for left in lefts if left is not None), {})


def room_for(left: Tensor | None) -> Tensor | None:
    """Room for the gradient of its sum (T, r)."""
    return None if left is None else left.new_empty(left.shape[1:])


def gradient(room: Tensor | None, left: Tensor | None) -> Tensor | None:
    """That gradient as each part's: (n, T, r)."""
    return None if room is None or left is None else room.expand(left.shape)
