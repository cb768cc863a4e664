"""The layer that every method shares: a linear layer that keeps its base weight under its own key."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..config import AdapterConfig
from ..ops.adding import autocasts
from ..ops.mix import Asked, takes_bones, takes_left, takes_low_square, takes_sums
from .method import AfterNorm, AroundSquare, Method, Opened, Params
from .product import DENSE, Frozen, Product
from .quant import QuantizedProduct, quantize
from .tokens import linear


class AdapterLinear(nn.Module):
    """Takes the place of an nn.Linear, whose `weight` and `bias` it keeps, and adds its method's tensors.

    The trainable ones are parameters under the method's names, its constants buffers. What a file or a merge needs to
    know of the layer is in `method`, `rank`, `scale` and `quant`.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, base: nn.Linear, method: Method, config: AdapterConfig, constants: Params) -> None:
        """base: the nn.Linear to replace; config: an AdapterConfig that `check_adapter` accepts; constants: {name:
        tensor} of the method's initial_factors, or a file's."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.method, self.rank, self.scale, self.dropout = method, config.rank, method.scale(config), config.dropout
        self.quant, self.untrained = "none", False
        self.weight = base.weight
        self.bias = base.bias
        shapes = method.shapes(config.rank, config.mini_rank, base.out_features, base.in_features)
        for name in method.parameters:
            zeros = torch.zeros(shapes[name], dtype=self.weight.dtype, device=self.weight.device)
            self.register_parameter(name, nn.Parameter(zeros))
        method.begin(self, constants)

    @property
    def base(self) -> torch.Tensor:
        """The tensor that `product` multiplies by: the weight, or what a quantized layer keeps of it."""
        return self.weight if self.quant == "none" else self.packed

    @property
    def product(self) -> Product:
        """How to multiply by `base`; see product.py."""
        if self.quant == "none":
            return DENSE
        return QuantizedProduct(self.quant, (self.out_features, self.in_features), self.scales)

    def frozen(self, residual: torch.Tensor | None = None) -> Frozen:
        """The linear layer under the adapter, whose result is added to a residual where there is one."""
        return Frozen(self.base, self.bias, self.product, residual)

    @property
    def params(self) -> Params:
        """The method's tensors."""
        return {name: getattr(self, name) for name in (*self.method.parameters, *self.method.constants)}

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (..., in) -> (..., out) in x's dtype, added to a residual (..., out) where there is one. shift (T, rank): x
        comes as `bones` asked for it, and this with it."""
        base, params = self.frozen(residual), self.params
        if shift is not None:
            return self._after.given(x, shift, base, params, self.scale)
        if self.untrained:
            first = self.method.first(params)
            if first is None:
                return linear(x, base.weight, base.bias, product=base.product, residual=residual)
            params = first
        dropout = self.dropout if self.training and not self.untrained else 0.0
        return self.method.apply(x, base, params, self.scale, dropout)

    def bones(self, x: torch.Tensor, kept: bool = False) -> Asked:
        """What the layer asks of what makes x (..., in), as ops/mix has it: the matrices by which that may bend x,
        unless others have x `kept` as it is; or the rank of the sums over shards of x; None where x is all that is
        wanted."""
        after = self.method.after_norm
        if after is None:
            return None
        if after.sums:
            return self.rank if takes_sums(x, self.rank) and self.is_plain(x) else None
        if kept or not (takes_bones(x, self.rank) and self.can_part(x)) or self.base.requires_grad:
            return None
        bones = after.bones(self.params, self.scale)
        return None if bones is None else bones.to(x.dtype)

    def around_square(self, x: torch.Tensor, channels: int) -> bool:
        """Whether the layer, before or after a squared relu of so many channels, leaves its part of low rank to its
        kernel, whose input is like x: the one place that decides."""
        can = self.method.around_square is not None and self.can_part(x)
        return can and takes_low_square(x, channels, self.rank, *self.trained)

    def before_norm(self, x: torch.Tensor) -> bool:
        """Whether the layer leaves what it adds to each shard of its outputs to a frozen norm that reads them, where
        its input is like x: the one place that decides."""
        can = self.method.before_norm is not None and self.can_part(x)
        return can and takes_left(x, self.out_features, self.rank, *self.trained)

    def can_part(self, x: torch.Tensor) -> bool:
        """Whether a part of what the layer does can be done outside its forward. Parameters that ZeRO-3 cuts are whole
        there alone; to name one elsewhere has ZeRO-3 gather it for the module that does, so that this comes first and
        looks at them without their names."""
        cut = any([hasattr(parameter, "ds_shape") for parameter in self._parameters.values()])
        return not cut and self.is_plain(x)

    def is_plain(self, x: torch.Tensor) -> bool:
        """Whether the layer does what its method trains, to all of an input in its dtype: needs no parameter."""
        return not (self.untrained or (self.dropout and self.training) or autocasts(x))

    @property
    def trained(self) -> list[torch.Tensor]:
        """The method's parameters."""
        return [getattr(self, name) for name in self.method.parameters]

    def opened(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> Opened:
        """`forward` before such a square, without what its kernel adds: x (..., in), shift as `forward` has it."""
        if shift is not None:
            return self._after.open_given(x, shift, self.frozen(), self.params, self.scale)
        return self._around.opened(x, self.frozen(), self.params, self.scale)

    def squared(
        self, x: torch.Tensor, left: torch.Tensor, up: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `closed` is to be given after such a square, of what the layer before has `opened`."""
        return self._around.squared(Opened(x, left, up), self.params, self.rank)

    def closed(self, x: torch.Tensor, right: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`forward` after such a square, of what `squared` gives: x (..., in), right (T, r) or None."""
        return self._around.closed(x, right, self.frozen(residual), self.params, self.scale)

    def unshifted(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        right: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, or `closed` where right is given, before such a norm, without what it adds (BeforeNorm)."""
        if shift is not None:
            y, left, _ = self._after.open_given(x, shift, self.frozen(residual), self.params, self.scale)
            return y, left[None]
        assert self.method.before_norm is not None  # `before_norm` has said so
        return self.method.before_norm.unshifted(x, right, self.frozen(residual), self.params, self.scale)

    @property
    def _after(self) -> AfterNorm:
        assert self.method.after_norm is not None  # `bones` has asked for something
        return self.method.after_norm

    @property
    def _around(self) -> AroundSquare:
        assert self.method.around_square is not None  # `around_square` has said so
        return self.method.around_square

    def quantize(self, kind: str) -> None:
        """Replace the weight by its quantized form ("nf4" or "int8"); it is frozen from then on."""
        packed, scales = quantize(self.weight.detach(), kind)
        del self.weight
        self.quant = kind
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def base_weight(self) -> torch.Tensor:
        """The weight that the layer multiplies by, without the adapter: (out, in) float32."""
        return self.product.rows(self.base, slice(0, self.out_features), torch.float32)

    def extra_repr(self) -> str:
        quant = "" if self.quant == "none" else f", quant={self.quant}"
        return f"{self.in_features}, {self.out_features}, {self.method.name}, rank={self.rank}{quant}"


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Meanwhile the adapters of a model are as they were before training. For passes without gradients."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    for layer in layers:
        layer.untrained = True
    try:
        yield
    finally:
        for layer in layers:
            layer.untrained = False
