"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA turns the rows of the weight, and their lengths train by themselves.

Row o of W' is (1 + gain_o) |W_o| (W + U)_o / |(W + U)_o| with LoRA's update U = scale B A. A gain that starts at zero,
in place of the paper's magnitude (1 + gain) |W|, keeps its small steps in bfloat16 too. As in the paper (section 4.3),
the length |(W + U)_o| counts as a constant in the backward pass. It is never read off W + U:
|W_o + U_o|² = |W_o|² + 2 W_o · U_o + |U_o|², with W Aᵀ (out, rank) as the only product with the weight.

Its file holds the |W_o| that it began with as `lora_row_norm` (out,).
"""

import math
from types import MappingProxyType

import torch
from torch import Tensor

from ..config import AdapterConfig
from . import low_rank
from .change import Change, Params, cast
from .method import Alpha, Constants, Method, Shapes, Tensors, rank_up_to
from .product import Frozen

BY_ROW = ("lora_B", "lora_gain", "lora_row_norm")


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    rows = (out_features,)
    return low_rank.shapes(config, out_features, in_features) | {"lora_gain": rows, "lora_row_norm": rows}


def make(weight: Tensor, config: AdapterConfig, gradient: Tensor | None) -> Params:
    return {"lora_row_norm": weight.detach().float().norm(dim=1)}


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    y = low_rank.apply(x, base, params, scale, dropout)
    with torch.no_grad():
        products = base.product.forward(params["lora_A"].to(x.dtype), base.weight).t()  # W Aᵀ (out, r)
        length = _length(products.float(), params, scale)
    # the change of y is zero at first, and small: a factor near 1 would lose it in bfloat16
    change = params["lora_row_norm"].float() * (1 + params["lora_gain"].float()) / length - 1
    turned = y if base.bias is None else y - base.bias.to(y.dtype)
    return torch.addcmul(y, turned, change.to(y.dtype))


def step(method: Method, config: AdapterConfig, in_features: int) -> float:
    """A row turns as LoRA's moves, and its gain lengthens it in proportion to the rate."""
    return math.hypot(low_rank.step(method, config, in_features), 1 / math.sqrt(in_features))


class Turned(Change):
    """The rows of W turned by U, and lengthened."""

    def delta(self, weight: Tensor, params: Params, scale: float = 1.0) -> Tensor:
        params = cast(params, weight.dtype)
        length = _length(weight @ params["lora_A"].t(), params, scale)
        factor = params["lora_row_norm"] * (1 + params["lora_gain"]) / length
        return factor[:, None] * (weight + low_rank.LOW_RANK.delta(weight, params, scale)) - weight


def _length(products: Tensor, params: Params, scale: float) -> Tensor:
    """|W_o + U_o| (out,) from W Aᵀ (out, r) and the params, in the dtype of W Aᵀ."""
    params = cast(params, products.dtype)
    lora_A, lora_B = params["lora_A"], params["lora_B"]
    cross = (lora_B * products).sum(1)
    squares = (lora_B * (lora_B @ (lora_A @ lora_A.t()))).sum(1)
    squared = params["lora_row_norm"].square() + 2 * scale * cross + scale**2 * squares
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()  # a row of zeros stays one


METHOD = Method(
    name="dora",
    tensors=Tensors(
        ("lora_A", "lora_B", "lora_gain"),
        ("rank",),
        shapes,
        low_rank.sizes,
        rank_up_to(min),
        idle=("lora_A", "lora_row_norm"),
    ),
    change=Turned(MappingProxyType(dict.fromkeys(BY_ROW, 0))),
    apply=apply,
    draw=low_rank.draw,
    held=Constants(("lora_row_norm",), make),
    alpha=Alpha(),
    step=step,
)
