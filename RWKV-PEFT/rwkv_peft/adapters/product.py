"""Multiplies by an adapter's frozen weight, through one small interface, so that every adapter works on a dense weight
and on a quantized one.

A product has `forward(z, weight, bias)` = z weightᵀ + bias and `backward(g, weight)` = g weight for z (T, in) and g (T,
out); `add_forward_` and `add_backward_` add the same to what is there, which they read while they compute: an adapter's
own part, made first, then needs no pass over the result to be added. `rows` reads the weight in float, and `shape` is
its (out, in). `weight` is the tensor that the layer owns, passed through save_for_backward as it is: under ZeRO-3 a
parameter's storage comes and goes, and a copy or a view of it would outlive its gathering.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F


class Product(Protocol):
    """The interface that the module's docstring describes; bias may be None."""

    def shape(self, weight: torch.Tensor, /) -> tuple[int, int]: ...

    def rows(self, weight: torch.Tensor, rows: slice, dtype: torch.dtype, /) -> torch.Tensor: ...

    def forward(self, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, /) -> torch.Tensor: ...

    def backward(self, g: torch.Tensor, weight: torch.Tensor, /) -> torch.Tensor: ...

    def add_forward_(
        self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, /
    ) -> None: ...

    def add_backward_(self, dz: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, /) -> None: ...


class Dense:
    """Products with an ordinary weight (out, in), computed in the activations' dtype."""

    @staticmethod
    def shape(weight: torch.Tensor) -> tuple[int, int]:
        return weight.shape[0], weight.shape[1]

    @staticmethod
    def rows(weight: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of the weight (a slice) in a float dtype."""
        return weight[rows].to(dtype)

    @staticmethod
    def forward(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(z, weight.to(z.dtype), None if bias is None else bias.to(z.dtype))

    @staticmethod
    def backward(g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return g @ weight.to(g.dtype)

    @staticmethod
    def add_forward_(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        if bias is not None:
            y += bias  # first, so that all of it is rounded once where y is zero
        y.addmm_(z, weight.to(z.dtype).t())

    @staticmethod
    def add_backward_(dz: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> None:
        dz.addmm_(g, weight.to(g.dtype))


DENSE = Dense()


class Frozen(NamedTuple):
    """The linear layer under an adapter: its weight as product takes it, and its bias (out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    product: Product = DENSE
