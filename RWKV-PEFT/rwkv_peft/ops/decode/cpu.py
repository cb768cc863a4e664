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


def product(x: Tensor, weight: Tensor | Blocks, level: str = "") -> Tensor:
    """x (n, in), contiguous, times the transpose of weight (out, in): -> (n, out)."""
    if isinstance(weight, Blocks):
        tensors, bits, out = dict(w=weight.words, scales=weight.scales), weight.bits, weight.out_features
    else:
        tensors, bits, out = dict(w=weight.contiguous()), 0, weight.shape[0]
    y = x.new_empty(x.shape[0], out)
    sizes = dict(rows=x.shape[0], in_features=x.shape[1], out_features=out, bits=bits)
    FAMILY.library(level).decode_product(fill(ProductArguments, x, dict(x=x, y=y, **tensors), **sizes))
    return y
