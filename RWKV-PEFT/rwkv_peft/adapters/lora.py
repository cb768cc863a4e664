"""LoRA (Hu et al. 2021, arXiv 2106.09685), and LoRA+ (Hayou et al. 2024, arXiv 2402.12354), which trains the same layer
with another learning rate for lora_B."""

import math
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..config import AdapterConfig
from .method import Layer, Method, Misfit, Params, Shapes, cast, wide
from .product import DENSE, Frozen, Product
from .tokens import apply_to_tokens, linear, of_weight_and_bias


class Lora(Method):
    """W' = W + scale B A, with A = `lora_A` (rank, in) and B = `lora_B` (out, rank); scale is alpha / rank."""

    name, label, peft = "lora", "lora", "lora"
    json_flag, rank_flag = "lora_config", "lora_r in --lora_config"
    alpha_key: str | None = "lora_alpha"
    parameters: tuple[str, ...] = ("lora_A", "lora_B")
    idle: tuple[str, ...] = ("lora_A",)
    scaled = dropout = in_rwkv_peft = True

    def scale(self, config: AdapterConfig) -> float:
        return config.alpha / config.rank if config.alpha else 1.0

    def first_step(self, config: AdapterConfig, in_features: int) -> float | None:
        """B is zero, so that A's entries, of variance 1 / (3 in), carry the step of B."""
        ratio = math.prod(getattr(config, field) for tensor, field in self.learning_rates if tensor == "lora_B")
        return self.scale(config) * ratio * math.sqrt(config.rank / (3 * in_features))

    def fit(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Misfit | None:
        limit = self.most(out_features, in_features)
        if rank <= limit:
            return None
        return Misfit("rank", rank, f"is more than {limit}, the most that {self.name} can use", limit, too_large=True)

    def most(self, out_features: int, in_features: int) -> int:
        """The largest rank."""
        return min(out_features, in_features)

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}

    def begin(self, layer: Layer, constants: Params) -> None:
        factor = layer.get_parameter("lora_A")
        drawn = torch.empty_like(factor, device="cpu")  # where a seed draws the same, whatever the card
        with torch.no_grad():
            factor.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))

    def apply(self, x: torch.Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> torch.Tensor:
        weight, bias, product = base
        if not dropout:
            return lora(x, weight, params["lora_A"], params["lora_B"], bias, scale=scale, product=product)
        inner = F.linear(F.dropout(x, dropout), params["lora_A"].to(x.dtype))
        own = scale * F.linear(inner, params["lora_B"].to(x.dtype))
        return linear(x, weight, bias, product=product) + own

    def delta(self, weight: torch.Tensor, params: Params, scale: float = 1.0) -> torch.Tensor:
        params = cast(params, weight.dtype)
        return scale * (params["lora_B"] @ params["lora_A"])

    def rows(self, params: Params, start: int, stop: int) -> Params:
        return {name: tensor[start:stop] if name.endswith("B") else tensor for name, tensor in params.items()}

    def opposite(self, params: Params, scale: float, amount: float = 1.0) -> Params:
        """The change does not depend on W, and is subtracted."""
        return {name: -amount * wide(tensor) if name.endswith("B") else tensor for name, tensor in params.items()}

    def as_lora(self, params: Params, scale: float, out_features: int, in_features: int) -> Params | None:
        return {"lora_A": params["lora_A"].float(), "lora_B": scale * params["lora_B"].float()}

    def remark_for_rwkv_peft(self, rank: int, scale: float) -> str:
        return (
            f"RWKV-PEFT's LoRA files do not hold alpha: it is {scale * rank:g}; give it to the "
            "merge, RWKV-PEFT's or merge_bone.py's (--lora_alpha)\n"
        )


class LoraPlus(Lora):
    """LoRA whose lora_B learns at lora_plus_ratio times the rate of lora_A."""

    name, label, peft, saved_as = "lora-plus", "lora-plus", "lora-plus", "lora"
    learning_rates = (("lora_B", "lora_plus_ratio"),)


def lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    product: Product = DENSE,
) -> torch.Tensor:
    """Low rank: W' = W + scale B A.

    x (..., in), weight (out, in), lora_A (r, in), lora_B (out, r), bias (out,) or None -> (..., out).
    """
    return apply_to_tokens(_Lora, x, weight, bias, lora_A, lora_B, product=product, extra=(scale,))


def scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b, for matrices, in one operation."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


class _Lora(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        product: Product,
        scale: float,
    ) -> torch.Tensor:
        inner = x @ lora_A.t()  # (T, r)
        ctx.product, ctx.scale = product, scale
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None,
            weight,
            lora_A,
            lora_B,
            inner if ctx.needs_input_grad[4] else None,
        )
        y = scaled_product(inner, lora_B.t(), scale)
        product.add_forward_(y, x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_A, lora_B, inner = ctx.saved_tensors
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        g_inner = scaled_product(g, lora_B, ctx.scale) if need_x or need_A else None  # (T, r)
        dx = None
        if need_x and g_inner is not None:
            dx = g_inner @ lora_A
            ctx.product.add_backward_(dx, g, weight)
        return (
            dx,
            *of_weight_and_bias(ctx, g, x, weight),
            g_inner.t() @ x if need_A and g_inner is not None else None,
            scaled_product(g.t(), inner, ctx.scale) if need_B else None,
            None,
            None,
        )
