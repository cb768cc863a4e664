"""Products of a few rows with a large matrix, plain or in blocks of integers, as a step of decoding takes them."""

from .blocks import BITS, BLOCK, Blocks, quantize
from .op import MOST_ROWS, product
from .tape import Tape

__all__ = ["BITS", "BLOCK", "MOST_ROWS", "Blocks", "Tape", "product", "quantize"]
