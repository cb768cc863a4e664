"""The mix operations that work within heads: autograd Functions over cpu/mix and cuda/mix.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .functions import call, differentiable_once, rounded, sums_like


class NormGate(Function):
    """y (B, T, H, N), g (B, T, H N), weight and bias (H N,), eps -> (B, T, H N)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y, g, weight, bias)
        ctx.eps = eps
        out = torch.empty_like(g)
        call("norm_gate_forward", y, dict(y=y, g=g, weight=weight, bias=bias, out=out), eps=eps, **head_sizes(y))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, g, weight, bias = ctx.saved_tensors
        gy, gg = torch.empty_like(y), torch.empty_like(g)
        sums = sums_like((weight, bias), any(ctx.needs_input_grad[2:4]))
        tensors = dict(y=y, g=g, weight=weight, bias=bias, grad=grad, gy=gy, gg=gg, gweight=sums[0], gbias=sums[1])
        call("norm_gate_backward", y, tensors, eps=ctx.eps, **head_sizes(y))
        return gy, gg, *rounded(sums, weight.dtype), None


class DeltaKeys(Function):
    """k, low (B, T, H, N), a0, k_k, k_a of H N elements -> key, a, b (B, T, H, N)."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, low: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(k, low, a0, k_k, k_a)
        key, a, b = outs = tuple(torch.empty_like(k) for _ in range(3))
        tensors = dict(k=k, low=low, a0=a0, k_k=k_k, k_a=k_a, key=key, a=a, b=b)
        call("delta_keys_forward", k, tensors, **head_sizes(k))
        return outs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gkey: Tensor, ga: Tensor, gb: Tensor) -> tuple[Tensor | None, ...]:
        k, low, a0, k_k, k_a = ctx.saved_tensors
        gk, glow = torch.empty_like(k), torch.empty_like(low)
        sums = sums_like((a0, k_k, k_a), any(ctx.needs_input_grad[2:]))
        tensors = dict(k=k, low=low, a0=a0, k_k=k_k, k_a=k_a, gkey=gkey, ga=ga, gb=gb, gk=gk, glow=glow)
        tensors |= dict(zip(("ga0", "gk_k", "gk_a"), sums))
        call("delta_keys_backward", k, tensors, **head_sizes(k))
        return gk, glow, *rounded(sums, k.dtype)


class NormBonusGate(Function):
    """eps; y, r, k, v (B, T, H, N), g (B, T, H N), r_k, weight and bias of H N elements -> (B, T, H N)."""

    @staticmethod
    def forward(ctx: Any, eps: float, *tensors: Tensor) -> Tensor:
        y, r, k, v, g, r_k, weight, bias = tensors
        ctx.save_for_backward(*tensors)
        ctx.eps = eps
        out = torch.empty_like(g)
        given = dict(y=y, r=r, k=k, v=v, g=g, r_k=r_k, weight=weight, bias=bias, out=out)
        call("norm_bonus_gate_forward", y, given, eps=eps, **head_sizes(y))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, r, k, v, g, r_k, weight, bias = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (y, r, k, v, g)]
        sums = sums_like((r_k, weight, bias), any(ctx.needs_input_grad[6:]))
        tensors = dict(y=y, r=r, k=k, v=v, g=g, r_k=r_k, weight=weight, bias=bias, grad=grad)
        tensors |= dict(zip("gy gr gk gv gg gr_k gweight gbias".split(), (*gradients, *sums)))
        call("norm_bonus_gate_backward", y, tensors, eps=ctx.eps, **head_sizes(y))
        return None, *gradients, *rounded(sums, weight.dtype)


def head_sizes(like: Tensor) -> dict[str, int]:
    """The sizes of a tensor (B, T, H, N) that a kernel needs."""
    B, T, H, N = like.shape
    return dict(tokens=B * T, channels=H * N, size=N)
