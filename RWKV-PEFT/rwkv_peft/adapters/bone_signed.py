"""bone-signed: bone that sums the shards of the input with signs, drawn once for each input.

Bone's Σ_b x_b sketches the input in `rank` numbers, each the sum of the inputs that share it. Signs make a count sketch
of it (Charikar, Chen and Farach-Colton 2002; hashed features, Weinberger et al. 2009, arXiv 0902.2206): the common part
of the inputs cancels instead of adding up, so that the mean of two sketches' product is the product of the inputs. It
is LoRA with this sketch as an A that does not train.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from ..config import AdapterConfig
from . import bone
from .change import Params, Sum
from .functions.lora import lora
from .method import Constants, Method, Shapes, Tensors
from .product import Frozen


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return {"bone": (config.rank, out_features), "bone_signs": (in_features,)}


def make(weight: Tensor, config: AdapterConfig, gradient: Tensor | None) -> Params:
    """The same signs for all layers of a width; the file holds them."""
    width = weight.shape[1]
    return {"bone_signs": 2.0 * torch.randint(2, (width,), generator=torch.Generator().manual_seed(width)) - 1}


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    bone = params["bone"]
    return lora(x, base, sketch(params["bone_signs"], len(bone)), bone.t())


def sketch(signs: Tensor, rank: int) -> Tensor:
    """Signs (in,) -> the matrix (rank, in) that sums the shards of an input with them; in need not be a multiple."""
    width = signs.shape[0]
    shards = torch.eye(rank, dtype=signs.dtype, device=signs.device).repeat(1, -(-width // rank))
    return shards[:, :width] * signs


def update(params: Params, scale: float, shape: tuple[int, int]) -> Tensor:
    return bone.update(params, scale, shape) * params["bone_signs"]


def as_lora(params: Params, scale: float, out_features: int, in_features: int) -> Params:
    bone = params["bone"].float()
    return {"lora_A": sketch(params["bone_signs"].float(), bone.shape[0]), "lora_B": bone.t().contiguous()}


# W'[o, i] = W[o, i] + s_i D[i mod rank, o] with D = `bone` (rank, out) and s = `bone_signs` (in,) of 1 and -1
METHOD = Method(
    name="bone-signed",
    tensors=Tensors(("bone",), ("rank",), shapes, bone.sizes, bone.misfit, idle=("bone_signs",)),
    change=Sum(MappingProxyType({"bone": 1}), update=update, negated=("bone",)),
    apply=apply,
    held=Constants(("bone_signs",), make),
    lora=as_lora,
)
