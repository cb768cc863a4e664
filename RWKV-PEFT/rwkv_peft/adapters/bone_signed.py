"""bone-signed: bone that sums the shards of the input with signs, drawn once for each input.

Bone's Σ_b x_b sketches the input in `rank` numbers, each the sum of the inputs that share it. Signs make a count sketch
of it (Charikar, Chen and Farach-Colton 2002; hashed features, Weinberger et al. 2009, arXiv 0902.2206): what the
inputs have in common cancels instead of adding up, so that products of two sketches have those of the inputs as their
mean. It is LoRA with this sketch as an A that does not train.
"""

import torch

from ..config import AdapterConfig
from .bone import Bone
from .lora import lora
from .method import Layer, Params, Shapes
from .product import DENSE, Frozen, Product


class BoneSigned(Bone):
    """W'[o, i] = W[o, i] + s_i D[i mod rank, o] with D = `bone` (rank, out) and s = `bone_signs` (in,) of 1 and -1."""

    name, label = "bone-signed", "Bone bone-signed"
    constants = idle = ("bone_signs",)
    hf_names = ()
    in_rwkv_peft = False

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        return super().shapes(rank, mini_rank, out_features, in_features) | {"bone_signs": (in_features,)}

    def initial_factors(
        self, weight: torch.Tensor, config: AdapterConfig, gradient: torch.Tensor | None = None
    ) -> Params:
        """The same signs for all layers of a width; the file holds them."""
        width = weight.shape[1]
        return {"bone_signs": 2.0 * torch.randint(2, (width,), generator=torch.Generator().manual_seed(width)) - 1}

    def begin(self, layer: Layer, constants: Params) -> None:
        signs = constants["bone_signs"].to(layer.weight.device, layer.weight.dtype)
        layer.register_buffer("bone_signs", signs, persistent=False)

    def apply(self, x: torch.Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> torch.Tensor:
        bone, signs = params["bone"], params["bone_signs"]
        return bone_signed(x, base.weight, bone, signs, base.bias, product=base.product)

    def delta(self, weight: torch.Tensor, params: Params, scale: float = 1.0) -> torch.Tensor:
        return super().delta(weight, params, scale) * params["bone_signs"].to(weight.dtype)

    def rows(self, params: Params, start: int, stop: int) -> Params:
        return {**super().rows(params, start, stop), "bone_signs": params["bone_signs"]}

    def opposite(self, params: Params, scale: float, amount: float = 1.0) -> Params:
        return {**super().opposite(params, scale, amount), "bone_signs": params["bone_signs"]}

    def as_lora(self, params: Params, scale: float, out_features: int, in_features: int) -> Params | None:
        bone = params["bone"].float()
        return {"lora_A": sketch(params["bone_signs"].float(), bone.shape[0]), "lora_B": bone.t().contiguous()}


def bone_signed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bone: torch.Tensor,
    signs: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    product: Product = DENSE,
) -> torch.Tensor:
    """Dimension sharding with signs: W'[o, i] = W[o, i] + s_i D[i mod r, o].

    x (..., in), weight (out, in), bone (r, out), signs (in,), bias (out,) or None -> (..., out) in x's dtype. in need
    not be a multiple of r.
    """
    return lora(x, weight, sketch(signs, bone.shape[0]), bone.t(), bias, product=product)


def sketch(signs: torch.Tensor, rank: int) -> torch.Tensor:
    """Signs (in,) -> the matrix (rank, in) that sums the shards of an input with them."""
    width = signs.shape[0]
    shards = torch.eye(rank, dtype=signs.dtype, device=signs.device).repeat(1, -(-width // rank))
    return shards[:, :width] * signs
