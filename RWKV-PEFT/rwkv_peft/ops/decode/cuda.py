"""Calls cuda/decode: products with matrices in blocks, and the matrices that blocks stand for, on NVIDIA GPUs."""

import ctypes

import torch
from torch import Tensor

from ..native.arguments import aligned, fields
from ..native.cuda import DTYPES, CudaFamily
from .blocks import BITS, Blocks

ROWS = (1, 16)  # the most rows of a kernel of products
MOST_ROWS = ROWS[-1]
BAND = 1 << 25  # weights of a band that is multiplied as a plain matrix
DEQUANTIZE_THREADS = 256  # of a block in cuda/decode/blocks.cuh, which take 16 bytes each
KINDS = [f"{dtype}_{bits}" for dtype in DTYPES.values() for bits in BITS]
KERNELS = (
    *(f"decode_product_{kind}_{rows}" for kind in KINDS for rows in ROWS),
    *(f"decode_dequantize_{kind}" for kind in KINDS),
)


class DecodeArguments(ctypes.Structure):
    """The structure of the same name in cuda/decode/arguments.cuh."""

    _fields_ = fields("x words y", "in_features out_features", flags="rows")


def product(x: Tensor, weight: Blocks) -> Tensor:
    """x (n, in), contiguous, of at most 16 rows, times the transpose of the matrix: -> (n, out)."""
    y = x.new_empty(len(x), weight.out_features)
    most = next(rows for rows in ROWS if len(x) <= rows)
    call(f"product_{DTYPES[x.dtype]}_{weight.bits}_{most}", aligned(x), weight, y, len(weight.words))
    return y


def dequantized(weight: Blocks, dtype: torch.dtype) -> Tensor:
    """Blocks.dequantized, by one kernel."""
    y = weight.words.new_empty(weight.out_features, weight.in_features, dtype=dtype)
    blocks = -(-weight.integers.nbytes // (16 * DEQUANTIZE_THREADS))
    call(f"dequantize_{DTYPES[dtype]}_{weight.bits}", None, weight, y, blocks)
    return y


def call(name: str, x: Tensor | None, weight: Blocks, y: Tensor, blocks: int) -> None:
    """Enqueue a kernel on the GPU of y. name: its name in KERNELS without "decode_"."""
    given = dict(x=x, words=weight.words, y=y, rows=len(y))
    given |= dict(in_features=weight.in_features, out_features=weight.out_features)
    FAMILY.run(f"decode_{name}", y, given, blocks)


FAMILY = CudaFamily("decode", KERNELS, DecodeArguments)
