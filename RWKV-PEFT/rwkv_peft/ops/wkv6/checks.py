"""What wkv6 accepts: each rule is checked once, here, before any backend sees a tensor."""

from torch import Tensor

from .. import recurrence
from ..recurrence import as_int64

__all__ = ["as_int64", "check", "check_bounds"]


def check(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raise ValueError, with the value, the rule and the remedy, where the arguments of wkv6 do not fit together."""
    recurrence.check("wkv6", dict(r=r, k=k, v=v, w=w), state, cu_seqlens, "key", dict(u=u))
    if u.shape != v.shape[2:]:
        raise ValueError(f"wkv6: u is {tuple(u.shape)}; it must be (H, N) = {tuple(v.shape[2:])}: view it so")


def check_bounds(cu_seqlens: Tensor, T: int) -> None:
    """Raise ValueError unless cu_seqlens bounds sequences of T tokens in all."""
    recurrence.check_bounds("wkv6", cu_seqlens, T)
