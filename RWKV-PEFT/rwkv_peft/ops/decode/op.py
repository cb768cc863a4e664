"""The product of rows with a matrix, plain or in blocks: kernels for few rows, plain torch for the rest."""

import torch
from torch import Tensor

from ..products import linear
from . import cpu, cuda
from .blocks import Blocks

MOST_ROWS = 64  # rows up to which a CPU's kernels are faster than torch's


def product(x: Tensor, weight: Tensor | Blocks) -> Tensor:
    """x (..., in) times the transpose of weight (out, in): -> (..., out) in x's dtype. A product with Blocks has no
    gradient."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if isinstance(weight, Blocks):
        found = product_with_blocks(rows, weight)
    elif 0 < len(rows) <= MOST_ROWS and not trains(x, weight) and cpu.FAMILY.takes(rows, weight):
        found = rows.new_empty(len(rows), len(weight))
        cpu.product_into(rows, weight, found)
    else:
        return linear(x, weight)
    return found.view(*x.shape[:-1], found.shape[-1])


def product_with_blocks(x: Tensor, weight: Blocks) -> Tensor:
    """The same of x (n, in), contiguous. Many rows on a GPU take plain products with the matrix, a band at a time."""
    if x.dtype == torch.float16 and len(x) <= cuda.MOST_ROWS:  # which no kernel takes
        return product_with_blocks(x.float(), weight).half()
    if cpu.FAMILY.takes(x):
        found = x.new_empty(len(x), weight.out_features)
        for few, own in zip(x.split(MOST_ROWS), found.split(MOST_ROWS)):
            cpu.product_into(few, weight, own)
        return found
    if not cuda.FAMILY.takes(x):
        return linear(x, weight.dequantized(x.dtype))
    if len(x) <= cuda.MOST_ROWS:
        return cuda.product(x, weight)
    parts = [linear(x, cuda.dequantized(band, x.dtype)) for band in weight.bands(cuda.BAND)]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def trains(x: Tensor, weight: Tensor) -> bool:
    """True if autograd needs the product."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
