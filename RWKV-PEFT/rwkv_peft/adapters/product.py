"""How an adapter multiplies by its frozen weight: one small interface, so that every adapter
works on a dense weight and on a quantized one.

A product has `forward(z, weight, bias)` = z weightᵀ + bias and `backward(g, weight)` = g weight for
z (T, in), g (T, out); `rows` reads the weight in float, and `shape` is its (out, in). `weight` is the tensor that the
layer owns, passed through save_for_backward as it is: under ZeRO-3 a parameter's storage comes
and goes, and a copy or a view of it would outlive its gathering.
"""

import torch.nn.functional as F


class Dense:
    """Products with an ordinary weight (out, in), computed in the activations' dtype."""

    @staticmethod
    def shape(weight):
        return tuple(weight.shape)

    @staticmethod
    def rows(weight, rows, dtype):
        """Some rows of the weight (a slice) in a float dtype."""
        return weight[rows].to(dtype)

    @staticmethod
    def forward(z, weight, bias=None):
        return F.linear(z, weight.to(z.dtype), None if bias is None else bias.to(z.dtype))

    @staticmethod
    def backward(g, weight):
        return g @ weight.to(g.dtype)


DENSE = Dense()
