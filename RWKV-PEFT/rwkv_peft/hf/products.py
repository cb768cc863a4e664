"""Which base layers Bone works on, and how it multiplies by their weights.

Dense linear layers use the product of rwkv_peft.adapters. Layers that bitsandbytes quantized (4-bit, 8-bit)
are dequantized for the time of one product, so that memory in training stays that of the quantized weight.
"""

import sys

import torch
from torch import nn

from ..adapters.product import DENSE
from ..errors import UserError


def product_for(layer, name):
    """The product (see adapters/product.py) for a base layer; raises UserError for one that is not linear."""
    bitsandbytes = sys.modules.get("bitsandbytes")  # a layer of its kind exists only once it is imported
    if bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear4bit):
        return Dequantized(layer, dequantize_4bit)
    if bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return Dequantized(layer, dequantize_8bit)
    if isinstance(layer, nn.Linear) and layer.weight.is_floating_point():
        return DENSE
    raise UserError(f"{name} is a {type(layer).__name__}, and Bone works on torch.nn.Linear and on the 4-bit and 8-bit "
                    "layers of bitsandbytes; leave it out of target_modules")


def dequantize_4bit(layer):
    """The weight (out, in) of a bitsandbytes Linear4bit."""
    from bitsandbytes.functional import dequantize_4bit as dequantize

    return dequantize(layer.weight.data, layer.weight.quant_state)


def dequantize_8bit(layer):
    """The weight (out, in) of a bitsandbytes Linear8bitLt: int8, with one scale a row."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    if scales is None:
        raise UserError("an 8-bit layer holds no scales yet: move the model to its device, which quantizes it, first")
    return int8_vectorwise_dequant(layer.weight.data, scales)


class Dequantized:
    """Products with a quantized layer's weight. The tensors given as `weight` are not read: what a quantized
    parameter needs beside its numbers is kept by the layer."""

    def __init__(self, layer, dequantize):
        self.layer, self.dequantize = layer, dequantize

    def shape(self, weight):
        return self.layer.out_features, self.layer.in_features

    def rows(self, weight, rows, dtype):
        return self.dequantize(self.layer)[rows].to(dtype)

    def forward(self, z, weight, bias=None):
        return DENSE.forward(z, self.dequantize(self.layer), bias)

    def backward(self, g, weight):
        return DENSE.backward(g, self.dequantize(self.layer))

    def compute_dtype(self, x):
        """The dtype in which the layer itself would compute with x."""
        return getattr(self.layer, "compute_dtype", None) or (x.dtype if x.is_floating_point() else torch.float32)
