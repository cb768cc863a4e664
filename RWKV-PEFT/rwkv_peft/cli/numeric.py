"""Tells what is a number in settings, flags, bodies and files. JSON tells True from 1, and so do these functions."""

import math
from numbers import Real
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    import torch


def is_whole(value: object, least: int | None = None) -> TypeGuard[int]:
    """Tell whether a value is a whole number, and at least `least` if that is given."""
    return type(value) is int and (least is None or value >= least)


def is_finite(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number that a float can hold, neither NaN nor infinite."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number that a float can hold, NaN and infinity among them."""
    return isinstance(value, float) or is_finite(value)


def all_finite(tensor: "torch.Tensor") -> bool:
    """Tell whether no element is NaN or Inf, with little memory beside the tensor."""
    # a sum over NaN or Inf is not finite, and the sum is the faster test; it may also overflow over finite values
    parts = tensor.reshape(-1).split(1 << 20)
    return all(bool(part.sum().isfinite() or part.isfinite().all()) for part in parts)
