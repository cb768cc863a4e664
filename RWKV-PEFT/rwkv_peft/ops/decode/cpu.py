"""Calls cpu/decode, which is built on first use."""

import ctypes

from torch import Tensor

from ..native.arguments import fields, fill
from ..native.cpu import CpuFamily
from .blocks import Blocks


class ProductArguments(ctypes.Structure):
    """The structure of the same name in cpu/decode/arguments.h. The next ones likewise."""

    _fields_ = fields("x w y", "rows in_features out_features", "", "bits bfloat16 threads")


class NormArguments(ctypes.Structure):
    _fields_ = fields("x add weight bias y", "rows channels", "eps")


class ElementArguments(ctypes.Structure):
    _fields_ = fields("x bias", "rows channels", "", "kind bfloat16 threads")


class Call(ctypes.Structure):
    _fields_ = fields("function arguments", "checked", "", "")


FUNCTIONS = (
    ("decode_product", None, ProductArguments),
    ("decode_norm", None, NormArguments),
    ("decode_elements", None, ElementArguments),
    ("decode_run", ctypes.c_int, Call, ctypes.c_int64),
)
FAMILY = CpuFamily("decode", FUNCTIONS)


def product_into(x: Tensor, weight: Tensor | Blocks, y: Tensor) -> None:
    """Fill y (n, out), contiguous, with x (n, in), contiguous, times the transpose of weight (out, in)."""
    tensors, sizes = given_to_product(x, weight, y)
    FAMILY.library().decode_product(fill(ProductArguments, x, tensors, **sizes))


def given_to_product(x: Tensor, weight: Tensor | Blocks, y: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors and sizes of ProductArguments."""
    if isinstance(weight, Blocks):
        tensors, bits = dict(x=x, w=weight.words, y=y), weight.bits
    else:
        tensors, bits = dict(x=x, w=weight.contiguous(), y=y), 0
    return tensors, dict(rows=x.shape[0], in_features=x.shape[1], out_features=y.shape[1], bits=bits)
