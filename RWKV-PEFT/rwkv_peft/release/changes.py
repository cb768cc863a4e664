"""The changes that an adapter makes to one tensor of the base.

A change can be cut by rows (`rows`), so that a large tensor is computed a band at a time; `unit` gives the multiples
of rows at which it may be cut.
"""

import math
from dataclasses import dataclass, replace

import torch

from ..adapters.change import Params
from ..adapters.method import Method
from ..adapters.quant import row_unit
from ..cli.errors import UserError
from ..config import AdapterConfig

ONES = AdapterConfig(rank=1, mini_rank=1, entries=1)  # the smallest sizes, which tell the number of dimensions


@dataclass(frozen=True)
class LayerChange:
    """The change of one weight by an adapted layer.

    params are its tensors as the Method takes them; scale is LoRA's; quant names the quantization of the frozen
    weight in training; dtype is that of the base in training, before it was quantized or a residual base was made of
    it; amount multiplies the whole change.
    """

    method: Method
    params: Params
    scale: float = 1.0
    quant: str = "none"
    amount: float = 1.0
    dtype: torch.dtype = torch.float32

    def unit(self, columns: int) -> int:
        """Return the multiple of rows at which bands of a weight with this many columns must start and end."""
        return math.lcm(self.method.change.row_unit(self.params), row_unit(self.quant, columns))

    def rows(self, start: int, stop: int) -> "LayerChange":
        """The same change for rows start to stop of the weight."""
        return replace(self, params=self.method.change.rows(self.params, start, stop))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Change weight (out, in) float32 -> float32, the weight that the trained layer computed with (at amount 1)."""
        base = weight.to(self.dtype) if self.method.residual is not None or self.quant != "none" else weight
        result = self.method.merged(base, self.params, scale=self.scale, quant=self.quant)
        return result if self.amount == 1 else torch.lerp(weight, result, self.amount)

    def removal(self) -> "Removal":
        """Return the change that takes this one off again, up to rounding. Raises UserError if none can."""
        return Removal(self.method, self.method.change.opposite(self.params, self.scale, self.amount), self.scale)


class Removal(LayerChange):
    """The opposite of a LayerChange. It does not replay the rounding of the base."""

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return self.method.change.removed(weight, self.params, self.scale)


@dataclass(frozen=True)
class WholeChange:
    """The change by a tensor that was trained in full and replaces the base's; amount as in LayerChange."""

    tensor: torch.Tensor
    amount: float = 1.0

    def unit(self, columns: int) -> int:
        return 1

    def rows(self, start: int, stop: int) -> "WholeChange":
        return replace(self, tensor=self.tensor[start:stop])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        new = self.tensor.float()
        return new if self.amount == 1 else torch.lerp(weight, new, self.amount)


def check_params(name: str, method: Method, params: Params, weight_shape: tuple[int, ...]) -> None:
    """Raise UserError unless the tensors of a Method's adapter fit a weight (out, in)."""
    if len(weight_shape) != 2:
        raise UserError(
            f"{name} is no linear layer: its weight has shape {weight_shape}, and an adapter changes a "
            "matrix; it was trained on another model"
        )
    label = method.name
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    dims = {name: len(shape) for name, shape in method.tensors.shapes(ONES, *weight_shape).items()}
    odd = [shape for key, shape in shapes.items() if 0 in shape or len(shape) != dims[key]]
    if odd:
        raise UserError(
            f"{name} holds a tensor of shape {odd[0]}, which no {label} adapter has; the file is damaged, or "
            "describes itself wrongly"
        )
    config = method.tensors.config(params)
    due = method.tensors.shapes(config, *weight_shape)
    misfit = method.tensors.fit(config, *weight_shape)
    if misfit is not None and not misfit.too_large:
        raise UserError(
            f"{name} is a {label} adapter whose {misfit.setting} {misfit.value} {misfit.problem}, and the base weight "
            f"has shape {weight_shape}; it was trained on another model"
        )
    if shapes != {key: due[key] for key in shapes}:
        given, needed = (", ".join(str(group[key]) for key in shapes) for group in (shapes, due))
        raise UserError(
            f"{name} is a {label} adapter of shape {given}, and a base weight of shape {weight_shape} "
            f"needs {needed}; it was trained on another model"
        )
