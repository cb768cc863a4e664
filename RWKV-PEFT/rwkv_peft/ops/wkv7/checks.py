"""What wkv7 accepts: each rule is checked once, here, before any backend sees a tensor."""

from torch import Tensor

from .. import recurrence


def check(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raise ValueError, with the value, the rule and the remedy, where the arguments of wkv7 do not fit together."""
    recurrence.check("wkv7", dict(r=r, w=w, k=k, v=v, a=a, b=b), state, cu_seqlens, "value", {})
