"""The layer that every method shares: a linear layer that keeps its base weight under its own key."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from .change import Params
from .functions.tokens import flat, linear
from .method import Method
from .product import DENSE, Frozen, Product
from .quant import QuantizedProduct, quantize

QUANTIZED = ("packed", "scales")  # buffers of a quantized weight


class AdapterLinear(nn.Module):
    """Takes the place of an nn.Linear, keeps its `weight` and `bias`, and adds its method's tensors.

    The trainable ones are parameters under the method's names, its constants buffers, beside others that the method
    makes of them. Files and merges read `method`, `scale` and `quant` of a layer.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, base: nn.Linear, method: Method, config: AdapterConfig, constants: Params) -> None:
        """base: the nn.Linear to replace; config: an AdapterConfig that `check_adapter` accepts; constants: {name:
        tensor} that the method makes, or a file's."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.method, self.rank, self.scale, self.dropout = method, config.rank, method.scale(config), config.dropout
        self.quant, self.untrained = "none", False
        self.weight = base.weight
        self.bias = base.bias
        shapes = method.tensors.shapes(config, base.out_features, base.in_features)
        for name in method.parameters:
            zeros = torch.zeros(shapes[name], dtype=self.weight.dtype, device=self.weight.device)
            self.register_parameter(name, nn.Parameter(zeros))
        if method.draw is not None:
            method.draw(self, config)
        if method.held is not None:
            method.held.keep(self, constants)

    @property
    def base(self) -> Tensor:
        """The tensor that `product` multiplies by: the weight, or its quantized form."""
        return self.weight if self.quant == "none" else self.packed

    @property
    def product(self) -> Product:
        """Multiplies by `base`; see product.py."""
        if self.quant == "none":
            return DENSE
        return QuantizedProduct(self.quant, (self.out_features, self.in_features), self.scales)

    @property
    def frozen(self) -> Frozen:
        """The linear layer under the adapter."""
        return Frozen(self.base, self.bias, self.product)

    @property
    def params(self) -> Params:
        """The method's tensors, and the buffers that it keeps in the layer."""
        parameters = {name: getattr(self, name) for name in self.method.parameters}
        return parameters | {name: buffer for name, buffer in self.named_buffers() if name not in QUANTIZED}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        base, params = self.frozen, self.params
        if self.untrained:
            if self.method.residual is None:
                return linear(x, base)
            params = self.method.residual.first(params)
        dropout = self.dropout if self.training and not self.untrained else 0.0
        return self.method.apply(x, base, params, self.scale, dropout)

    def quantize(self, kind: str) -> None:
        """Replace the weight by its quantized form ("nf4" or "int8"); it is frozen from then on."""
        packed, scales = quantize(self.weight.detach(), kind)
        del self.weight
        self.quant = kind
        for name, buffer in zip(QUANTIZED, (packed, scales)):
            self.register_buffer(name, buffer, persistent=False)

    def base_weight(self) -> Tensor:
        """The weight that the layer multiplies by, without the adapter: (out, in) float32."""
        return self.product.rows(self.base, slice(0, self.out_features), torch.float32)

    def extra_repr(self) -> str:
        quant = "" if self.quant == "none" else f", quant={self.quant}"
        return f"{self.in_features}, {self.out_features}, {self.method.name}{quant}"


class ScaledProduct:
    """Products, without gradients, with the weight that an adapter's layer makes of `inner`'s: that weight and `amount`
    times the change of it."""

    def __init__(self, layer: AdapterLinear, amount: float, inner: Product) -> None:
        self.method, self.scale, self.inner = layer.method, layer.scale, inner
        params = layer.method.change.times(layer.params, amount)  # spares a second product with the weight
        self.params, self.amount = (layer.params, amount) if params is None else (params, 1.0)

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return self.inner.shape(weight)

    def rows(self, weight: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        whole = self.inner.rows(weight, slice(0, self.shape(weight)[0]), torch.float32)
        changed = self.method.change.added(whole, self.params, self.scale)
        return torch.lerp(whole, changed, self.amount)[rows].to(dtype)

    def forward(self, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        changed = self.method.apply(z, Frozen(weight, bias, self.inner), self.params, self.scale, 0.0)
        return changed if self.amount == 1 else torch.lerp(self.inner.forward(z, weight, bias), changed, self.amount)

    def backward(self, g: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def add_forward_(self, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        y += self.forward(z, weight, bias)

    def add_backward_(self, dz: Tensor, g: Tensor, weight: Tensor) -> None:
        raise NotImplementedError


class ScaledLinear(nn.Module):
    """A frozen linear layer with adapters' layers at scales, each applied to the result of those before, as merging
    does; the weights are none of its own."""

    def __init__(self, base: nn.Linear, layers: Sequence[tuple[AdapterLinear, float]]) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.product: Product = DENSE
        for layer, amount in layers:
            self.product = ScaledProduct(layer, amount, self.product)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        return self.product.forward(flat(x), self.weight, self.bias).view(*x.shape[:-1], -1)


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Meanwhile the adapters of a model are as they were before training, and it begins without tuned states: so are
    all modules that have an attribute `untrained`. For passes without gradients."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "untrained")]
    for module in modules:
        module.untrained = True
    try:
        yield
    finally:
        for module in modules:
            module.untrained = False
