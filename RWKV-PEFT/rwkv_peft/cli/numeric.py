"""Tests on numbers in settings, flags, bodies and files. True is not 1, as in JSON."""

import math
from numbers import Real
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    import torch


def is_whole(value: object, least: int | None = None) -> TypeGuard[int]:
    """True for a whole number, at least `least` if that is given."""
    return type(value) is int and (least is None or value >= least)


def is_finite(value: object) -> TypeGuard[float]:
    """True for a number that a float can hold, neither NaN nor infinite."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def is_number(value: object) -> TypeGuard[float]:
    """True for a number that a float can hold, NaN and infinity included."""
    return isinstance(value, float) or is_finite(value)


def all_finite(tensor: "torch.Tensor") -> bool:
    """True if no element is NaN or Inf; takes little memory beside the tensor."""
    # a sum over NaN or Inf is not finite, and the sum is the faster test; it may also overflow over finite values
    parts = tensor.reshape(-1).split(1 << 20)
    return all(bool(part.sum().isfinite() or part.isfinite().all()) for part in parts)
