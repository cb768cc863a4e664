"""The base layers that Bone works on, and the products with their weights.

Dense linear layers use the product of rwkv_peft.adapters, and GPT-2's the same on their weight's transpose. Layers that
bitsandbytes quantized (4-bit, 8-bit) are dequantized for one product at a time, so that only the quantized weight stays
in memory.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters.product import DENSE, Product
from ..cli.errors import UserError
from ..models.parts import Linear

DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def product_for(layer: nn.Module, name: str) -> Product:
    """The Product (adapters/product.py) for a base layer. Raises UserError for one that Bone does not work on."""
    bitsandbytes = sys.modules.get("bitsandbytes")  # its layers exist only if it is imported
    if bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear4bit):
        keep_unpacked(layer)
        return Dequantized(layer, dequantize_4bit)
    if bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return Dequantized(layer, dequantize_8bit)
    # A subclass may compute something else, or keep scales beside an 8-bit float weight; Falcon's computes the same.
    known = (nn.Linear.forward, Linear.forward, Conv1D.forward)
    plain = type(layer).forward in known or type(layer).__name__ == "FalconLinear"
    own = "weight" in layer._parameters  # else pruning or weight_norm computes it, and a merge would be lost
    if plain and own and layer.weight.dtype in DENSE_DTYPES:
        return TRANSPOSED if isinstance(layer, Conv1D) else DENSE
    kind = type(layer).__name__
    if isinstance(layer, nn.Linear):
        kind += f" of {layer.weight.dtype}" if own else " with a weight that is computed from other tensors"
    raise UserError(
        f"{name} is of type {kind}, and Bone works on torch.nn.Linear, on GPT-2's Conv1D, and on the 4-bit and 8-bit "
        "layers of bitsandbytes; leave it out of target_modules (if you named none: name those that Bone should adapt)"
    )


def keep_unpacked(layer: Any) -> None:
    """Keep a Linear4bit's weight in the form that dequantize_4bit reads.

    On processors with AVX512-BF16 its own forward without gradients would repack the weight in place, once, in a form
    that only that forward reads; if it has done so, this undoes it.
    """
    from bitsandbytes import functional

    layer.support_avx512bf16_for_cpu = False
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        unpack = functional._convert_weight_packed_for_cpu_inverse
        layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, layer.weight.quant_state)


def dequantize_4bit(layer: Any) -> torch.Tensor:
    """The weight (out, in) of a bitsandbytes Linear4bit."""
    from bitsandbytes.functional import dequantize_4bit as dequantize

    return dequantize(layer.weight.data, layer.weight.quant_state)


def dequantize_8bit(layer: Any) -> torch.Tensor:
    """The weight (out, in) of a bitsandbytes Linear8bitLt, which holds int8 and one scale a row. Raises UserError if
    the layer has no scales yet."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    if scales is None:
        raise UserError("an 8-bit layer holds no scales yet: move the model to its device, which quantizes it, first")
    return int8_vectorwise_dequant(layer.weight.data, scales)


class Dequantized:
    """Products with a quantized layer's weight. `weight` is not read; the layer is, because it holds the scales
    too."""

    def __init__(self, layer: Any, dequantize: Callable[[Any], torch.Tensor]) -> None:
        self.layer, self.dequantize = layer, dequantize

    def shape(self, weight: torch.Tensor) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def rows(self, weight: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        return self.dequantize(self.layer)[rows].to(dtype)

    def forward(self, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return DENSE.forward(z, self.dequantize(self.layer), bias)

    def backward(self, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return DENSE.backward(g, self.dequantize(self.layer))

    def add_forward_(
        self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        DENSE.add_forward_(y, z, self.dequantize(self.layer), bias)

    def add_backward_(self, dz: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> None:
        DENSE.add_backward_(dz, g, self.dequantize(self.layer))

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        """The dtype in which the layer's own forward would compute with x."""
        return getattr(self.layer, "compute_dtype", None) or (x.dtype if x.is_floating_point() else torch.float32)


class Transposed:
    """Products with a weight that its layer keeps as (in, out), as GPT-2's Conv1D does."""

    def shape(self, weight: torch.Tensor) -> tuple[int, int]:
        return DENSE.shape(weight.t())

    def rows(self, weight: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        return DENSE.rows(weight.t(), rows, dtype).contiguous()

    def forward(self, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return DENSE.forward(z, weight.t(), bias)

    def backward(self, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return DENSE.backward(g, weight.t())

    def add_forward_(
        self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        DENSE.add_forward_(y, z, weight.t(), bias)

    def add_backward_(self, dz: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> None:
        DENSE.add_backward_(dz, g, weight.t())


TRANSPOSED = Transposed()


def device_of(layer: nn.Linear) -> torch.device:
    """The device on which a layer computes: its hook's if it has one, else its weight's."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return layer.weight.device if device is None else device


def offloaded(layer: nn.Linear) -> bool:
    """True if a layer's weight is offloaded between uses."""
    return getattr(getattr(layer, "_hf_hook", None), "offload", False)


def onload(modules: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Load the modules' tensors; -> x on their device."""
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            (x,), _ = hook.pre_forward(module, x)
    return x


def offload(modules: Sequence[nn.Module], y: torch.Tensor) -> torch.Tensor:
    """Offload the tensors that onload loaded; -> y on the device that the hooks give it."""
    for module in reversed(modules):
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            y = hook.post_forward(module, y)
    return y
