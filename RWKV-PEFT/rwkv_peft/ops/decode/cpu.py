"""Calls cpu/decode, which is built on first use."""

import ctypes

from torch import Tensor

from ..native.arguments import fields, fill
from ..native.cpu import CpuFamily
from .blocks import Blocks


class ProductArguments(ctypes.Structure):
    """The structure of the same name in cpu/decode/arguments.h."""

    _fields_ = fields("x w scales y", "rows in_features out_features", "", "bits bfloat16 threads")


FAMILY = CpuFamily("decode", (("decode_product", None, ProductArguments),))


def product_into(x: Tensor, weight: Tensor | Blocks, y: Tensor) -> None:
    """Fill y (n, out), contiguous, with x (n, in), contiguous, times the transpose of weight (out, in)."""
    if isinstance(weight, Blocks):
        tensors, bits = dict(x=x, w=weight.words, scales=weight.scales, y=y), weight.bits
    else:
        tensors, bits = dict(x=x, w=weight.contiguous(), y=y), 0
    sizes = dict(rows=x.shape[0], in_features=x.shape[1], out_features=y.shape[1], bits=bits)
    FAMILY.library().decode_product(fill(ProductArguments, x, tensors, **sizes))
