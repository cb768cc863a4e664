"""bone: dimension sharding (Kang and Yin 2024, arXiv 2409.15371, its later versions, as MiSS too), and its mini form.

Every shard of the input shares one small matrix: y = W x + Dᵀ Σ_b x_b, so that Σ_b x_b (T, rank) is all that the
backward pass of D needs.
"""

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..errors import UserError
from ..ops.bone import plus_tiled, shard_sum, split_shards
from .method import Method, Misfit, Params, Shapes, nearest_divisor, wide
from .product import DENSE, Frozen, Product
from .tokens import apply_to_tokens, of_weight_and_bias


class Bone(Method):
    """W'[o, i] = W[o, i] + D[i mod rank, o] with D = `bone` (rank, out)."""

    name, label, peft = "bone", "Bone bone", "bone"
    json_flag, rank_flag = "bone_config", "--bone_r"
    parameters = ("bone",)
    hf_names: tuple[bool | str, ...] = (True, False, "bone")
    in_rwkv_peft = True

    def fit(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Misfit | None:
        if rank <= in_features:
            return None
        return Misfit(
            "rank", rank, f"is more than {in_features}, the most that {self.name} can use", in_features, too_large=True
        )

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        return {"bone": (rank, out_features)}

    def apply(self, x: torch.Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> torch.Tensor:
        return bone(x, base.weight, params["bone"], base.bias, product=base.product)

    def delta(self, weight: torch.Tensor, params: Params, scale: float = 1.0) -> torch.Tensor:
        update, (out_features, in_features) = params["bone"].to(weight.dtype), weight.shape
        columns = torch.arange(out_features, device=update.device) % update.shape[1]
        rank = update.shape[0]
        rows = update.t()[columns].repeat(1, -(-in_features // rank))  # (out, in rounded up to a multiple of r)
        return rows[:, :in_features]

    def rows(self, params: Params, start: int, stop: int) -> Params:
        return {"bone": params["bone"][:, start:stop]}

    def opposite(self, params: Params, scale: float, amount: float = 1.0) -> Params:
        """The change does not depend on W, and is subtracted."""
        return {"bone": -amount * wide(params["bone"])}

    def as_lora(self, params: Params, scale: float, out_features: int, in_features: int) -> Params | None:
        """lora_A = [I I …], cut at in; lora_B = Dᵀ."""
        update = params["bone"].float()
        rank, width = update.shape
        identity = torch.eye(rank).repeat(1, -(-in_features // rank))[:, :in_features]
        return {"lora_A": identity.contiguous(), "lora_B": update.t()[torch.arange(out_features) % width].contiguous()}


class BoneMini(Bone):
    """bone with `bone` (rank, mini_rank) repeated along the outputs. MiSS's mini."""

    name, label, mini = "bone-mini", "Bone bone-mini", True
    hf_names = ("mini",)

    def fit(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Misfit | None:
        if mini_rank < 1 or out_features % mini_rank:
            nearest = nearest_divisor(out_features, mini_rank if mini_rank > 0 else rank)
            return Misfit("mini_rank", mini_rank, f"does not divide {out_features}", nearest)
        return super().fit(rank, mini_rank, out_features, in_features)

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        return {"bone": (rank, mini_rank)}

    def sizes(self, params: Params) -> tuple[int, int]:
        rank, mini_rank = params["bone"].shape
        return rank, mini_rank

    def row_unit(self, params: Params) -> int:
        return params["bone"].shape[-1]

    def rows(self, params: Params, start: int, stop: int) -> Params:
        return params

    def for_rwkv_peft(self, module: str, params: Params, scale: float, weight: torch.Tensor | None) -> Params:
        """As bone, of the layer's width."""
        if weight is None:
            raise UserError(
                f"RWKV-PEFT has no bone-mini, and as bone it needs the layers' widths: give --base_model, the model "
                f"that {module}.bone was trained on"
            )
        out_features, mini_rank = weight.shape[0], params["bone"].shape[1]
        if out_features % mini_rank:
            raise UserError(
                f"{module}.bone repeats every {mini_rank} outputs, which does not divide the layer's {out_features}: "
                "the base is another model than it was trained on"
            )
        return {"bone": params["bone"].repeat(1, out_features // mini_rank)}


def bone(
    x: torch.Tensor,
    weight: torch.Tensor,
    bone: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    product: Product = DENSE,
) -> torch.Tensor:
    """Dimension sharding: W'[o, i] = W[o, i] + D[i mod r, o mod m].

    x (..., in), weight (out, in), bone (r, m) where m divides out (m = out is Bone, less is its
    mini form), bias (out,) or None -> (..., out) in x's dtype. in need not be a multiple of r.
    """
    return apply_to_tokens(_Bone, x, weight, bias, bone, product=product)


class _Bone(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, bone: torch.Tensor, product: Product
    ) -> torch.Tensor:
        rank, width = bone.shape
        ctx.product = product
        total = shard_sum(x, rank)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight, bone, total if ctx.needs_input_grad[3] else None
        )
        out_features = product.shape(weight)[0]
        if width < out_features:
            return plus_tiled(
                total @ bone,
                out_features,
                lambda: product.forward(x, weight, bias),
                lambda y: product.add_forward_(y, x, weight, bias),
            )
        y = total @ bone
        product.add_forward_(y, x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bone, total = ctx.saved_tensors
        need_x, _, _, need_bone, _ = ctx.needs_input_grad
        rank, width = bone.shape
        folded = g if width == g.shape[1] else split_shards(g, width).sum(1)  # (T, m)
        dx = None
        if need_x:
            dx = plus_tiled(
                folded @ bone.t(),
                ctx.product.shape(weight)[1],
                lambda: ctx.product.backward(g, weight),
                lambda dx: ctx.product.add_backward_(dx, g, weight),
            )
        return (dx, *of_weight_and_bias(ctx, g, x, weight), total.t() @ folded if need_bone else None, None)
