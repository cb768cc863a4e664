"""bat-in-scaled: bat-in whose two terms have one size.

Adam moves each number of B by about the learning rate. bat-in's term B_b moves by as much, its term W_ab B_b, whose
numbers are sums over `rank` products, by rms(W) sqrt(rank) of it, which is less. With a = 1 / (rms(W) sqrt(rank)), a
constant of the layer, a W_ab B_b moves as far as B_b does (docs/guides/learning-rates.md).
"""

import math

import torch

from ..config import AdapterConfig
from ..errors import UserError
from .bat_in import BatIn, bat_in
from .method import Layer, Params, Shapes
from .product import Frozen


class BatInScaled(BatIn):
    """W'_ab = W_ab + a W_ab B_b + B_b with a = `bone_scale` (1,), which a file holds: W' does not tell it."""

    name, label = "bat-in-scaled", "Bone bat-in-scaled"
    constants = idle = ("bone_scale",)
    hf_names = ()
    in_rwkv_peft = False

    def first_step(self, config: AdapterConfig, in_features: int) -> float | None:
        return math.sqrt(2)  # of two terms of size 1

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        return super().shapes(rank, mini_rank, out_features, in_features) | {"bone_scale": (1,)}

    def initial_factors(
        self, weight: torch.Tensor, config: AdapterConfig, gradient: torch.Tensor | None = None
    ) -> Params:
        """As bfloat16 holds it, so that no cast of the model changes it; 1 where the weight is all zeros, and W B too,
        whatever it is multiplied by."""
        weight = weight.detach().cpu()  # where all ranks find the same number, whatever their cards
        size = weight.float().square().mean().sqrt() * math.sqrt(config.rank)
        scale = torch.where(size > 0, 1 / size, 1.0)
        return {"bone_scale": scale.bfloat16().float().reshape(1)}

    def begin(self, layer: Layer, constants: Params) -> None:
        """The layer keeps a as the number `scale`, too, which no step has to ask a GPU for."""
        scale = constants["bone_scale"]
        layer.register_buffer("bone_scale", scale.to(layer.weight.device, torch.float32), persistent=False)
        if not scale.is_meta:
            layer.scale = _number(scale)

    def apply(self, x: torch.Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> torch.Tensor:
        """scale is the layer's, of `begin`; under torch.compile the tensor serves, so that layers share a graph."""
        a = params["bone_scale"].float().squeeze() if torch.compiler.is_compiling() else scale
        return bat_in(x, base.weight, params["bone"], base.bias, scale=a, product=base.product)

    def multiplied(self, params: Params) -> torch.Tensor:
        return params["bone_scale"] * params["bone"]

    def opposite(self, params: Params, scale: float, amount: float = 1.0) -> Params:
        """W' = W (I + a B) + B is undone by the change of the same form and a with C / a in B's place, where
        C = (I + a B)^-1 - I: W = (W' - B)(I + a B)^-1 = W' (I + C) + C / a, as -B (I + a B)^-1 = C / a."""
        a = _number(params["bone_scale"])
        undone = super().opposite({"bone": a * params["bone"].double()}, scale, amount)["bone"]
        return {"bone": undone / a, "bone_scale": params["bone_scale"]}


def _number(bone_scale: torch.Tensor) -> float:
    """The number in a `bone_scale`. Raises UserError unless it is one to divide by."""
    number = float(bone_scale)
    if not (math.isfinite(number) and number > 0):
        raise UserError(
            f"the adapter has a bone_scale of {number:g}, and bat-in-scaled takes a finite number above 0; the file is "
            "damaged: copy it again"
        )
    return number
