"""The layer that every adapter shares: a linear layer that keeps its base weight under its own key."""

import torch
from torch import nn

from .delta import RESIDUAL_VARIANTS, delta
from .product import DENSE
from .quant import QuantizedProduct, quantize


class AdapterLinear(nn.Module):
    """Takes the place of an nn.Linear, whose `weight` and `bias` it keeps, and adds its own parameters.

    A subclass names its trainable tensors in `parameter_names` (the same names as in `delta`) and
    computes `forward`. What a file or a merge needs to know of the layer is in `variant`, `rank`,
    `scale` and `quant`.
    """

    parameter_names = ()

    def __init__(self, base, config):
        """base: the nn.Linear to replace; config: an AdapterConfig that `check_adapter` accepts."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.variant, self.rank = config.variant, config.rank
        self.scale = config.scale
        self.quant = "none"
        self.weight = base.weight
        self.bias = base.bias

    def new_parameter(self, *shape):
        """A trainable tensor of zeros in the weight's dtype, on its device."""
        return nn.Parameter(torch.zeros(shape, dtype=self.weight.dtype, device=self.weight.device))

    @property
    def base(self):
        """The tensor that `product` multiplies by: the weight, or what a quantized layer keeps of it."""
        return self.weight if self.quant == "none" else self.packed

    @property
    def product(self):
        """How to multiply by `base`; see product.py."""
        if self.quant == "none":
            return DENSE
        return QuantizedProduct(self.quant, (self.out_features, self.in_features), self.scales)

    def quantize(self, kind):
        """Replace the weight by its quantized form ("nf4" or "int8"); it is frozen from then on."""
        packed, scales = quantize(self.weight.detach(), kind)
        del self.weight
        self.quant = kind
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def base_weight(self):
        """The weight that the layer multiplies by, without the adapter: (out, in) float32."""
        return self.product.rows(self.base, slice(0, self.out_features), torch.float32)

    def merged_weight(self):
        """The weight of the plain linear layer that equals this one: (out, in) float32."""
        weight = self.base_weight().detach()
        params = {name: getattr(self, name).detach() for name in self.parameter_names}
        variant = "lora" if self.variant in RESIDUAL_VARIANTS else self.variant
        return weight + delta(variant, weight, params, scale=self.scale)

    def adapter_tensors(self):
        """What an adapter file holds of this layer: name -> tensor."""
        return {name: getattr(self, name) for name in self.parameter_names}

    def extra_repr(self):
        quant = "" if self.quant == "none" else f", quant={self.quant}"
        return f"{self.in_features}, {self.out_features}, {self.variant}, rank={self.rank}{quant}"
