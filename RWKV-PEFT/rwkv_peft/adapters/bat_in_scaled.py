"""bat-in-scaled: bat-in with two terms of one size.

Adam moves each number of B by about the learning rate. bat-in's term B_b moves by as much, its term W_ab B_b, whose
numbers are sums over `rank` products, by rms(W) sqrt(rank) of it, which is less. With a = 1 / (rms(W) sqrt(rank)), a
constant of the layer, a W_ab B_b moves as far as B_b does (docs/guides/learning-rates.md).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cli.errors import UserError
from ..config import AdapterConfig
from . import bat_in
from .block_affine import BlockAffine, fit, sizes, undone
from .change import Params
from .functions.bat_in import bat_in as of_activations
from .method import Constants, Layer, Method, Shapes, Tensors
from .product import Frozen


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return bat_in.shapes(config, out_features, in_features) | {"bone_scale": (1,)}


def make(weight: Tensor, config: AdapterConfig, gradient: Tensor | None) -> Params:
    """As bfloat16 holds it, so that no cast of the model changes it; 1 if the weight is all zeros."""
    weight = weight.detach().cpu()  # where all ranks find the same number, whatever their cards
    size = weight.float().square().mean().sqrt() * math.sqrt(config.rank)
    scale = torch.where(size > 0, 1 / size, 1.0)
    return {"bone_scale": scale.bfloat16().float().reshape(1)}


def keep(layer: Layer, constants: Params) -> None:
    """The layer keeps a as the number `scale` too, which no step has to read from a GPU."""
    scale = constants["bone_scale"]
    layer.register_buffer("bone_scale", scale.to(layer.weight.device, torch.float32), persistent=False)
    if not scale.is_meta:
        layer.scale = _number(scale)


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    """scale is the layer's, of `keep`; under torch.compile the tensor serves, so that layers share a graph."""
    a = params["bone_scale"].float().squeeze() if torch.compiler.is_compiling() else scale
    return of_activations(x, base, params["bone"], a)


@dataclass(frozen=True)
class Scaled(BlockAffine):
    """W_ab + a W_ab B_b + B_b with a = `bone_scale`."""

    def opposite(self, params: Params) -> Params:
        """W' = W (I + a B) + B is undone by the change of the same form and a with C / a in B's place, where
        C = (I + a B)^-1 - I: W = (W' - B)(I + a B)^-1 = W' (I + C) + C / a, as -B (I + a B)^-1 = C / a."""
        a = _number(params["bone_scale"])
        return {"bone": undone(a * params["bone"].double()) / a, "bone_scale": params["bone_scale"]}


def _number(bone_scale: Tensor) -> float:
    """The number in a `bone_scale`. Raises UserError unless it is one to divide by."""
    number = float(bone_scale)
    if not (math.isfinite(number) and number > 0):
        raise UserError(
            f"the adapter has a bone_scale of {number:g}, and bat-in-scaled takes a finite number above 0; the file is "
            "damaged: copy it again"
        )
    return number


# W'_ab = W_ab + a W_ab B_b + B_b with a = `bone_scale` (1,), which a file holds because W' does not tell it
METHOD = Method(
    name="bat-in-scaled",
    tensors=Tensors(("bone",), ("rank",), shapes, sizes, fit, idle=("bone_scale",)),
    change=Scaled(index="b", multiplied=lambda params: params["bone_scale"] * params["bone"]),
    apply=apply,
    held=Constants(("bone_scale",), make, keep),
    step=lambda method, config, in_features: math.sqrt(2),  # of two terms of size 1
)
