"""Products of a few rows with a large matrix, plain or in blocks of integers, as a step of decoding takes them: the
kernels of cpu/decode and cuda/decode for few rows, plain torch for the rest.
"""

import ctypes

import torch
from torch import Tensor

from ..native.calls import aligned, fields, fill
from ..native.cpu import CpuFamily
from ..native.cuda import CudaFamily
from ..products import linear
from .blocks import BITS, BLOCK, Blocks, quantize

__all__ = ["BITS", "BLOCK", "CPU", "CUDA", "CUDA_ROWS", "MOST_ROWS", "Blocks", "product", "quantize"]

MOST_ROWS = 64  # rows up to which a CPU's kernels are faster than torch's
ROWS = (1, 16)  # the most rows of a GPU's kernel of products
CUDA_ROWS = ROWS[-1]
CUDA_BAND = 1 << 25  # weights of a band that a GPU multiplies as a plain matrix
DEQUANTIZE_THREADS = 256  # of a block in cuda/decode/blocks.cuh, which take 16 bytes each


class ProductArguments(ctypes.Structure):
    """The structure of the same name in cpu/decode/arguments.h. The next ones likewise."""

    _fields_ = fields("x w y", "rows in_features out_features", "", "bits bfloat16 threads")


class NormArguments(ctypes.Structure):
    _fields_ = fields("x add weight bias y", "rows channels", "eps")


class ElementArguments(ctypes.Structure):
    _fields_ = fields("x bias", "rows channels", "", "kind bfloat16 threads")


class Call(ctypes.Structure):
    _fields_ = fields("function arguments", "checked", "", "")


class DecodeArguments(ctypes.Structure):
    """The structure of the same name in cuda/decode/arguments.cuh."""

    _fields_ = fields("x words y", "in_features out_features", flags="rows")


FUNCTIONS = (
    ("decode_product", None, ProductArguments),
    ("decode_norm", None, NormArguments),
    ("decode_elements", None, ElementArguments),
    ("decode_run", ctypes.c_int, Call, ctypes.c_int64),
)
KERNELS = (
    *(f"decode_product_{bits}_{rows}" for bits in BITS for rows in ROWS),
    *(f"decode_dequantize_{bits}" for bits in BITS),
)
CPU = CpuFamily("decode", FUNCTIONS)
CUDA = CudaFamily("decode", KERNELS, DecodeArguments)


def product(x: Tensor, weight: Tensor | Blocks) -> Tensor:
    """x (..., in) times the transpose of weight (out, in): -> (..., out) in x's dtype. A product with Blocks has no
    gradient."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if isinstance(weight, Blocks):
        y = product_with_blocks(rows, weight)
    elif 0 < len(rows) <= MOST_ROWS and not trains(x, weight) and CPU.takes(rows, weight):
        y = rows.new_empty(len(rows), len(weight))
        product_into(rows, weight, y)
    else:
        return linear(x, weight)
    return y.view(*x.shape[:-1], y.shape[-1])


def product_with_blocks(x: Tensor, weight: Blocks) -> Tensor:
    """The same of x (n, in), contiguous. Rows on a GPU are split for its kernel while that reads fewer bytes than
    making the matrix does; more rows take plain products with it, a band at a time."""
    tiles, bits = -(-len(x) // CUDA_ROWS), torch.finfo(x.dtype).bits
    few = tiles * weight.bits < weight.bits + 2 * bits  # a matrix is written and read once
    if x.dtype == torch.float16 and few and x.is_cpu:  # whose kernels take float32
        return product_with_blocks(x.float(), weight).half()
    if CPU.takes(x):
        y = x.new_empty(len(x), weight.out_features)
        for few, part in zip(x.split(MOST_ROWS), y.split(MOST_ROWS)):
            product_into(few, weight, part)
        return y
    if not CUDA.takes(x):
        return linear(x, weight.dequantized(x.dtype))
    if few:
        tiled = [cuda_product(rows, weight) for rows in x.split(CUDA_ROWS)]
        return torch.cat(tiled) if tiles > 1 else tiled[0]
    parts = [linear(x, cuda_dequantized(band)) for band in weight.bands(CUDA_BAND)]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def trains(x: Tensor, weight: Tensor) -> bool:
    """True if autograd needs the product."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def product_into(x: Tensor, weight: Tensor | Blocks, y: Tensor) -> None:
    """Fill y (n, out) with the product on the CPU; x and y are contiguous."""
    tensors, sizes = given_to_product(x, weight, y)
    CPU.library().decode_product(fill(ProductArguments, x, tensors, **sizes))


def given_to_product(x: Tensor, weight: Tensor | Blocks, y: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors and sizes of ProductArguments."""
    words, bits = (weight.words, weight.bits) if isinstance(weight, Blocks) else (weight.contiguous(), 0)
    sizes = dict(rows=x.shape[0], in_features=x.shape[1], out_features=y.shape[1], bits=bits)
    return dict(x=x, w=words, y=y), sizes


def cuda_product(x: Tensor, weight: Blocks) -> Tensor:
    """The product on a GPU of x (n, in), contiguous, of at most CUDA_ROWS rows."""
    y = x.new_empty(len(x), weight.out_features)
    most = next(rows for rows in ROWS if len(x) <= rows)
    call(f"product_{weight.bits}_{most}", aligned(x), weight, y, len(weight.words))
    return y


def cuda_dequantized(weight: Blocks) -> Tensor:
    """Blocks.dequantized in bfloat16, by one kernel."""
    y = weight.words.new_empty(weight.out_features, weight.in_features, dtype=torch.bfloat16)
    blocks = -(-weight.integers.nbytes // (16 * DEQUANTIZE_THREADS))
    call(f"dequantize_{weight.bits}", None, weight, y, blocks)
    return y


def call(name: str, x: Tensor | None, weight: Blocks, y: Tensor, blocks: int) -> None:
    """Enqueue a kernel on the GPU of y. name: its name in KERNELS without "decode_"."""
    given = dict(x=x, words=weight.words, y=y, rows=len(y))
    given |= dict(in_features=weight.in_features, out_features=weight.out_features)
    CUDA.run(f"decode_{name}", y, given, blocks)
