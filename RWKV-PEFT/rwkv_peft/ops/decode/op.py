"""The product of rows with a matrix, plain or in blocks: a kernel on the CPU for few rows, plain torch for the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .blocks import Blocks

MOST_ROWS = 64  # rows up to which the kernels are faster than torch's


def product(x: Tensor, weight: Tensor | Blocks) -> Tensor:
    """x (..., in) times the transpose of weight (out, in): -> (..., out) in x's dtype. A product with Blocks has no
    gradient."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if isinstance(weight, Blocks):
        if not cpu.FAMILY.takes(rows):
            return F.linear(x, weight.dequantized(x.dtype))
        found = rows.new_empty(len(rows), weight.out_features)
        for first in range(0, len(rows), MOST_ROWS):
            cpu.product_into(rows[first : first + MOST_ROWS], weight, found[first : first + MOST_ROWS])
    elif 0 < len(rows) <= MOST_ROWS and not trains(x, weight) and cpu.FAMILY.takes(rows, weight):
        found = rows.new_empty(len(rows), len(weight))
        cpu.product_into(rows, weight, found)
    else:
        return F.linear(x, weight)
    return found.view(*x.shape[:-1], found.shape[-1])


def trains(x: Tensor, weight: Tensor) -> bool:
    """True if autograd needs the product."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
