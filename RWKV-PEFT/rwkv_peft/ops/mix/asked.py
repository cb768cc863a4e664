"""What layers ask of the points that a norm makes for them: matrices that bend a point (affine.py), or a point's sum
over shards, by the number of channels of one, its rank.

On a GPU the kernels that make points make these sums, and those that read the points' gradients add theirs to them;
elsewhere nothing is given, and layers sum up for themselves.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import cuda, lefts
from .functions import numbered

Asked = Tensor | int | None  # of one point: matrices (C/r, r, r), the rank of its sum, or nothing


def rank_of(asked: Sequence[Asked], kind: type | tuple[type, ...]) -> int:
    """The rank of what is asked of points, which is of a kind, Tensor or int, and of one rank; else 0."""
    given = [one for one in asked if one is not None]
    ranks = {one.shape[-1] if isinstance(one, Tensor) else one for one in given}
    return ranks.pop() if len(ranks) == 1 and all([isinstance(one, kind) for one in given]) else 0


def matrices(asked: Sequence[Asked]) -> list[Tensor | None]:
    """The matrices that are asked for, None for a point without."""
    return [one if isinstance(one, Tensor) else None for one in asked]


def takes(x: Tensor, ranks: Sequence[Asked], left: Tensor | None) -> bool:
    """Whether the kernels of a norm of whole tokens give sums of points like x (B, T, C), None for a point without,
    where this was left of x (lefts.py)."""
    rank = rank_of(ranks, int)
    few = len(ranks) - list(ranks).count(None) <= cuda.MOST_SUMMED
    return few and lefts.takes(x.shape[-1], rank) and (left is None or left.shape[-1] == rank)


def sizes_of(ranks: Sequence[int | None]) -> dict[str, Any]:
    """What a launch is told of these; of nothing asked, nothing."""
    present = {i: rank for i, rank in enumerate(ranks) if rank is not None}
    return dict(summed=sum(1 << i for i in present), shard=max(present.values())) if present else {}


def gradients(ranks: Sequence[int | None], gshifts: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """The sums' gradients (T, r), None for one that nobody uses, by the names that layouts give a point's."""
    given = iter(gshifts)
    return numbered("gshift", [None if rank is None else next(given) for rank in ranks])
