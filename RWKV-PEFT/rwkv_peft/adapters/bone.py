"""bone: dimension sharding (Kang and Yin 2024, arXiv 2409.15371, its later versions, as MiSS too).

Every shard of the input shares one small matrix: y = W x + Dᵀ Σ_b x_b.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from ..config import AdapterConfig
from .change import Params, Sum
from .functions.bone import bone
from .method import HfForm, Method, Shapes, Tensors, Upstream, rank_up_to
from .product import Frozen

misfit = rank_up_to(lambda out_features, in_features: in_features)


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return {"bone": (config.rank, out_features)}


def sizes(params: Params) -> dict[str, int]:
    return {"rank": params["bone"].shape[0]}


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    return bone(x, base, params["bone"])


def update(params: Params, scale: float, shape: tuple[int, int]) -> Tensor:
    """D[i mod rank, o mod width] for all o and i."""
    (out_features, in_features), bone = shape, params["bone"]
    columns = torch.arange(out_features, device=bone.device) % bone.shape[1]
    rows = bone.t()[columns].repeat(1, -(-in_features // bone.shape[0]))  # (out, in rounded up to a multiple of r)
    return rows[:, :in_features]


def as_lora(params: Params, scale: float, out_features: int, in_features: int) -> Params:
    """lora_A = [I I …], cut at in; lora_B = Dᵀ."""
    bone = params["bone"].float()
    rank, width = bone.shape
    identity = torch.eye(rank).repeat(1, -(-in_features // rank))[:, :in_features]
    return {"lora_A": identity.contiguous(), "lora_B": bone.t()[torch.arange(out_features) % width].contiguous()}


# W'[o, i] = W[o, i] + D[i mod rank, o] with D = `bone` (rank, out)
METHOD = Method(
    name="bone",
    tensors=Tensors(("bone",), ("rank",), shapes, sizes, misfit),
    change=Sum(MappingProxyType({"bone": 1}), update=update, negated=("bone",)),
    apply=apply,
    lora=as_lora,
    upstream=Upstream(),
    hf=HfForm((True, False, "bone")),
)
