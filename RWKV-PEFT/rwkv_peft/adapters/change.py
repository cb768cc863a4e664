"""The change W' - W of a weight (out, in) by one layer's tensors: made, cut by rows, and taken off again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ..cli.errors import UserError

Params = Mapping[str, Tensor]  # {tensor name: tensor} of the adapter of one layer


@dataclass(frozen=True)
class Change(ABC):
    """The change that a method makes to a weight. cut names the axis along which a tensor holds the rows of the weight;
    other tensors serve all rows."""

    cut: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @abstractmethod
    def delta(self, weight: Tensor, params: Params, scale: float = 1.0) -> Tensor:
        """W' - W: weight (out, in) float32 or float64, params {name: tensor} of any float dtype -> (out, in) in
        weight's dtype, in which the arithmetic is done. Layers are tested against it."""

    def added(self, base: Tensor, params: Params, scale: float) -> Tensor:
        """W' from the float32 base that the layer trained on."""
        return base + self.delta(base, params, scale)

    def row_unit(self, params: Params) -> int:
        """Bands of rows of a weight must start and end at multiples of this to be changed by themselves."""
        return 1

    def rows(self, params: Params, start: int, stop: int) -> Params:
        """The params of rows start to stop of the weight."""
        return {
            name: tensor.narrow(self.cut[name], start, stop - start) if name in self.cut else tensor
            for name, tensor in params.items()
        }

    def times(self, params: Params, amount: float) -> Params | None:
        """params of `amount` times the change; None for a change that is not linear in them."""
        return None

    def opposite(self, params: Params) -> Params:
        """params with which `delta` of W' is W - W', up to rounding. Raises UserError if there are none."""
        raise UserError("nothing undoes a change of its kind; take the base itself")


@dataclass(frozen=True)
class Sum(Change):
    """W' = W + U for a U that does not depend on W, so that it can be subtracted: update(params, scale, shape) makes U
    in the dtype of params. negated names tensors that give -U with the opposite sign."""

    update: Callable[[Params, float, tuple[int, int]], Tensor] = field(kw_only=True)
    negated: tuple[str, ...] = field(kw_only=True)

    def delta(self, weight: Tensor, params: Params, scale: float = 1.0) -> Tensor:
        return self.update(cast(params, weight.dtype), scale, (weight.shape[0], weight.shape[1]))

    def times(self, params: Params, amount: float) -> Params:
        return {name: amount * wide(tensor) if name in self.negated else tensor for name, tensor in params.items()}

    def opposite(self, params: Params) -> Params:
        return self.times(params, -1.0)


def cast(params: Params, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in params.items()}


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in the float64 that it has."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
