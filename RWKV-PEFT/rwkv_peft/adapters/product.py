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
from torch import Tensor

from ..ops.products import addmm_, linear, matmul


class Product(Protocol):
    """The interface that the module's docstring describes; bias may be None."""

    def shape(self, weight: Tensor, /) -> tuple[int, int]: ...

    def rows(self, weight: Tensor, rows: slice, dtype: torch.dtype, /) -> Tensor: ...

    def forward(self, z: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor: ...

    def backward(self, g: Tensor, weight: Tensor, /) -> Tensor: ...

    def add_forward_(self, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> None: ...

    def add_backward_(self, dz: Tensor, g: Tensor, weight: Tensor, /) -> None: ...


class Dense:
    """Products with an ordinary weight (out, in), computed in the activations' dtype."""

    @staticmethod
    def shape(weight: Tensor) -> tuple[int, int]:
        return weight.shape[0], weight.shape[1]

    @staticmethod
    def rows(weight: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight (a slice) in a float dtype."""
        return weight[rows].to(dtype)

    @staticmethod
    def forward(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(z, weight.to(z.dtype), None if bias is None else bias.to(z.dtype))

    @staticmethod
    def backward(g: Tensor, weight: Tensor) -> Tensor:
        return matmul(g, weight.to(g.dtype))

    @staticmethod
    def add_forward_(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if bias is not None:
            y += bias  # first, so that all of it is rounded once where y is zero
        addmm_(y, z, weight.to(z.dtype).t())

    @staticmethod
    def add_backward_(dz: Tensor, g: Tensor, weight: Tensor) -> None:
        addmm_(dz, g, weight.to(g.dtype))


DENSE = Dense()


class Frozen(NamedTuple):
    """The linear layer under an adapter: its weight as product takes it, and its bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None
    product: Product = DENSE
