"""Shared by methods of low rank: A = `lora_A` (rank, in), B = `lora_B` (out, rank), and W' = W + scale B A."""

import math
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import AdapterConfig
from ..ops import products
from .change import Params, Sum
from .functions.lora import lora
from .functions.tokens import linear
from .method import Layer, Method, Shapes
from .product import Frozen


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return {"lora_A": (config.rank, in_features), "lora_B": (out_features, config.rank)}


def sizes(params: Params) -> dict[str, int]:
    return {"rank": params["lora_A"].shape[0]}


def draw(layer: Layer, config: AdapterConfig) -> None:
    """Draw A as nn.Linear draws its weight; B stays zero."""
    factor = layer.get_parameter("lora_A")
    drawn = torch.empty_like(factor, device="cpu")  # where a seed draws the same, whatever the card
    with torch.no_grad():
        factor.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))


def step(method: Method, config: AdapterConfig, in_features: int) -> float:
    """B is zero, so that A's entries, of variance 1 / (3 in), carry the step of B."""
    ratio = math.prod(getattr(config, field) for tensor, field in method.rates if tensor == "lora_B")
    return method.scale(config) * ratio * math.sqrt(config.rank / (3 * in_features))


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    if not dropout:
        return lora(x, base, params["lora_A"], params["lora_B"], scale)
    inner = products.linear(F.dropout(x, dropout), params["lora_A"].to(x.dtype))
    update = scale * products.linear(inner, params["lora_B"].to(x.dtype))
    return linear(x, base) + update


def update(params: Params, scale: float, shape: tuple[int, int]) -> Tensor:
    return scale * (params["lora_B"] @ params["lora_A"])


LOW_RANK = Sum(MappingProxyType({"lora_B": 0}), update=update, negated=("lora_B",))


def as_lora(params: Params, scale: float, out_features: int, in_features: int) -> Params:
    return {"lora_A": params["lora_A"].float(), "lora_B": scale * params["lora_B"].float()}
