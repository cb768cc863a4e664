"""wkv7 with what follows it, each head's norm, the current token's bonus and the gate: on a GPU one autograd Function.

The bonus reads r, k and v, as the recurrence does. Their gradients would be added up in passes of their own; here, the
recurrence's backward kernel makes those of r and k whole, of one number a token and head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..mix import norm_bonus_gate
from ..mix.functions import call, differentiable_once
from ..mix.heads import head_sizes
from ..mix.op import norms_fused
from ..recurrence.checks import as_int64, check
from .cuda import CHUNKED_SIZE, RECURRENCE
from .op import WKV7, wkv7
from .signature import SIGNATURE


def wkv7_gated(
    rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm_bonus_gate of what wkv7 gives, and the final state.

    rows: r w k v a b (B, T, H, N), state and cu_seqlens as wkv7 takes them; v (B, T, H, N) the values once more, for
    the bonus; g (B, T, H N), r_k (H, N), weight and bias (H N,) -> (B, T, H N), (B, H, N, N) float32.
    """
    r, _, k, *_ = rows
    if not _in_one(*rows, v, g, r_k, weight, bias):
        y, state = wkv7(*rows, state, cu_seqlens)
        return norm_bonus_gate(y, r, k, v, g, r_k, weight, bias, eps), state
    check(SIGNATURE, rows, state, cu_seqlens)
    tensors = (x.contiguous() for x in (*rows, v, g, r_k, weight, bias))
    state = None if state is None else state.float().contiguous()
    bounds = None if cu_seqlens is None else as_int64(cu_seqlens, r.shape[1])
    return WKV7Gated.apply(eps, state, bounds, *tensors)


def _in_one(*tensors: Tensor) -> bool:
    """Whether these, of which the last three are parameters, go through the Function: what they make is to be
    differentiated, the parameters are frozen, and the recurrence's chunked kernels take the rest."""
    r, *parameters = tensors[0], *tensors[-3:]
    return (
        r.dtype == torch.bfloat16
        and r.shape[-1] == CHUNKED_SIZE
        and torch.is_grad_enabled()
        and not any([x.requires_grad for x in parameters])
        and norms_fused(*tensors)
        and WKV7.backends.choose("auto", r.device.type, r.device.index, r.dtype) == "cuda"
    )


class WKV7Gated(Function):
    """eps, state (n, H, N, N) float32 or None, cu_seqlens int64 or None, r w k v a b and v again (B, T, H, N), g
    (B, T, H N), r_k, weight and bias of H N elements, bfloat16 -> (B, T, H N), final state."""

    @staticmethod
    def forward(ctx: Any, eps: float, state: Tensor | None, bounds: Tensor | None, *tensors: Tensor) -> Any:
        *rows, v, g, r_k, weight, bias = tensors
        y, final_state, checkpoints = RECURRENCE.forward(*rows, state, bounds, save=True)
        out, bonus = torch.empty_like(g), y.new_empty(y.shape[:3], dtype=torch.float32)
        given = dict(y=y, r=rows[0], k=rows[2], v=v, g=g, r_k=r_k, weight=weight, bias=bias)
        call("norm_bonus_gate_forward", y, given | dict(out=out, bonus=bonus), eps=eps, **head_sizes(y))
        ctx.save_for_backward(*rows, state, bounds, checkpoints, y, bonus, v, g, r_k, weight, bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return out, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, gfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        *kept, y, bonus, v, g, r_k, weight, bias = ctx.saved_tensors
        state = kept[-3]
        if grad is None:
            if gfinal is None:
                return (None,) * 14
            *found, gstate = RECURRENCE.backward(*kept, None, gfinal)
            return None, None if state is None else gstate, None, *found, *5 * (None,)
        gy, gv, gg, gbonus = (torch.empty_like(x) for x in (y, v, g, bonus))
        given = dict(y=y, v=v, g=g, grad=grad, bonus=bonus, weight=weight, bias=bias)
        call("bonus_gate_backward", y, given | dict(gy=gy, gv=gv, gg=gg, gbonus=gbonus), eps=ctx.eps, **head_sizes(y))
        *found, gstate = RECURRENCE.backward(*kept, gy, gfinal, r_k=r_k, gbonus=gbonus)
        return None, None if state is None else gstate, None, *found, gv, gg, None, None, None
