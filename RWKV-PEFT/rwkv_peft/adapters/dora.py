"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA turns the rows of the weight, and their lengths train by themselves.

Row o of W' is (1 + gain_o) |W_o| (W + U)_o / |(W + U)_o| with LoRA's update U = scale B A. A gain that starts at zero,
in place of the paper's magnitude (1 + gain) |W|, keeps its small steps in bfloat16 too. As in the paper (section 4.3),
the length |(W + U)_o| counts as a constant in the backward pass. It is never read off W + U:
|W_o + U_o|² = |W_o|² + 2 W_o · U_o + |U_o|², of which W Aᵀ (out, rank) is the only product with the weight.
"""

import torch

from ..config import AdapterConfig
from ..errors import UserError
from .lora import Lora
from .method import Layer, Params, Shapes, cast
from .product import Frozen


class Dora(Lora):
    """LoRA's tensors and `lora_gain` (out,); `lora_row_norm` (out,) holds |W_o|, so that a file says what it began
    with."""

    name, label, peft = "dora", "dora", "dora"
    parameters = ("lora_A", "lora_B", "lora_gain")
    constants = ("lora_row_norm",)
    idle = ("lora_A", "lora_row_norm")
    in_rwkv_peft = False

    def first_step(self, config: AdapterConfig, in_features: int) -> float | None:
        return None  # a gain moves its row by as much of it as the rate says

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        rows = (out_features,)
        return super().shapes(rank, mini_rank, out_features, in_features) | {"lora_gain": rows, "lora_row_norm": rows}

    def initial_factors(
        self, weight: torch.Tensor, config: AdapterConfig, gradient: torch.Tensor | None = None
    ) -> Params:
        return {"lora_row_norm": weight.detach().float().norm(dim=1)}

    def begin(self, layer: Layer, constants: Params) -> None:
        super().begin(layer, constants)
        norm = constants["lora_row_norm"].to(layer.weight.device, layer.weight.dtype)
        layer.register_buffer("lora_row_norm", norm, persistent=False)

    def apply(self, x: torch.Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> torch.Tensor:
        y = super().apply(x, base, params, scale, dropout)
        with torch.no_grad():
            products = base.product.forward(params["lora_A"].to(x.dtype), base.weight).t()  # W Aᵀ (out, r)
            length = _length(products.float(), params, scale)
        # what is added to y is zero at first, and small: a factor near 1 would lose it in bfloat16
        change = params["lora_row_norm"].float() * (1 + params["lora_gain"].float()) / length - 1
        turned = y if base.bias is None else y - base.bias.to(y.dtype)
        return torch.addcmul(y, turned, change.to(y.dtype))

    def delta(self, weight: torch.Tensor, params: Params, scale: float = 1.0) -> torch.Tensor:
        params = cast(params, weight.dtype)
        length = _length(weight @ params["lora_A"].t(), params, scale)
        factor = params["lora_row_norm"] * (1 + params["lora_gain"]) / length
        return factor[:, None] * (weight + super().delta(weight, params, scale)) - weight

    def merged_with(self, base: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
        return base + self.delta(base, params, scale)

    def rows(self, params: Params, start: int, stop: int) -> Params:
        return {name: tensor if name == "lora_A" else tensor[start:stop] for name, tensor in params.items()}

    def opposite(self, params: Params, scale: float, amount: float = 1.0) -> Params:
        """The params themselves, and how much of their change was merged. Raises UserError where a row's direction was
        lost."""
        if (params["lora_gain"] <= -1).any():
            raise UserError(
                "a gain of dora is -1 or less, so that merging lost a row's direction; take the base itself"
            )
        return {**params, "amount": torch.full_like(params["lora_gain"], amount, dtype=torch.float32)}

    def removed(self, weight: torch.Tensor, opposite: Params, scale: float) -> torch.Tensor:
        """W' = (1 - a) W + a f (W + U) for a row's factor f, an amount a: W = (W' - a f U) / (1 - a + a f), whose
        length is known, which leaves a quadratic equation for f. Raises UserError where it has no solution above 0."""
        params = cast(opposite, weight.dtype)
        update, a = super().delta(weight, params, scale), params["amount"]
        squared = params["lora_row_norm"].square()
        rest = squared - update.square().sum(1)
        if (rest <= 0).any():
            raise UserError(
                "an update of dora is as long as a row of the base, and has no inverse; take the base itself"
            )
        half = squared * (1 - a) + (weight * update).sum(1)
        last = squared * (1 - a).square() - weight.square().sum(1)
        factor = ((half.square() - rest * last).sqrt() - half) / (a * rest)
        return (weight - (a * factor)[:, None] * update) / (1 - a + a * factor)[:, None]

    def as_lora(self, params: Params, scale: float, out_features: int, in_features: int) -> Params | None:
        return None


def _length(products: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """|W_o + U_o| (out,) from W Aᵀ (out, r) and the params, in the dtype of W Aᵀ."""
    params = cast(params, products.dtype)
    lora_A, lora_B = params["lora_A"], params["lora_B"]
    along = (lora_B * products).sum(1)
    own = (lora_B * (lora_B @ (lora_A @ lora_A.t()))).sum(1)
    squared = params["lora_row_norm"].square() + 2 * scale * along + scale**2 * own
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()  # a row of zeros stays one
