"""wkv7 with its keys before it, and each head's norm, the current token's bonus and the gate after it: on a GPU one
autograd Function, where none of their parameters is trained.

The recurrence's kernels make their keys of what delta_keys would make them of, so that these are neither written nor
read. The bonus reads r, k and v, as the recurrence does: its forward kernel gives one number a token and head, and its
backward kernel makes the gradients of r and k whole, of one such number's gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..mix import delta_keys, norm_bonus_gate
from ..mix.functions import call, differentiable_once
from ..mix.heads import head_sizes
from ..mix.op import norms_fused
from ..recurrence.checks import as_int64, check
from .cuda import CHUNKED_SIZE, WITH_KEYS
from .op import WKV7, wkv7

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Keys = tuple[Tensor, Tensor, Tensor]


def wkv7_gated(
    rows: Rows,
    keys: Keys,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm_bonus_gate of what wkv7 gives for the keys that delta_keys gives, and the final state.

    rows: r w k v low (B, T, H, N), k and low as delta_keys takes them, keys its parameters, a0 k_k k_a (1, 1, H N);
    state and cu_seqlens as wkv7 takes them; v (B, T, H, N) the values once more, for the bonus; g (B, T, H N), r_k
    (H, N), weight and bias (H N,) -> (B, T, H N), (B, H, N, N) float32.
    """
    if not _in_one(*rows, v, g, *keys, r_k, weight, bias):
        r, w, k, values, low = rows
        k, a, b = delta_keys(k, low, *keys)
        y, state = wkv7(r, w, k, values, a, b, state, cu_seqlens)
        return norm_bonus_gate(y, r, k, v, g, r_k, weight, bias, eps), state
    check(WITH_KEYS.signature, rows, state, cu_seqlens)
    tensors = (x.contiguous() for x in (*rows, v, g, *keys, r_k, weight, bias))
    state = None if state is None else state.float().contiguous()
    bounds = None if cu_seqlens is None else as_int64(cu_seqlens, g.shape[1])
    return WKV7Gated.apply(eps, state, bounds, *tensors)


def _in_one(*tensors: Tensor) -> bool:
    """Whether these, of which the last six are parameters, go through the Function: what they make is to be
    differentiated, the parameters are frozen, and the recurrence's chunked kernels take the rest."""
    r, *parameters = tensors[0], *tensors[-6:]
    return (
        r.dtype == torch.bfloat16
        and r.shape[-1] == CHUNKED_SIZE
        and torch.is_grad_enabled()
        and not any([x.requires_grad for x in parameters])
        and norms_fused(*tensors)
        and WKV7.backends.choose("auto", r.device.type, r.device.index, r.dtype) == "cuda"
    )


class WKV7Gated(Function):
    """eps, state (n, H, N, N) float32 or None, cu_seqlens int64 or None, r w k v low and v again (B, T, H, N), g
    (B, T, H N), a0, k_k, k_a, r_k, weight and bias of H N elements, bfloat16 -> (B, T, H N), final state."""

    @staticmethod
    def forward(ctx: Any, eps: float, state: Tensor | None, bounds: Tensor | None, *tensors: Tensor) -> Any:
        *rows, v, g, a0, k_k, k_a, r_k, weight, bias = tensors
        bonus, scales = (g.new_empty(v.shape[:3], dtype=torch.float32) for _ in range(2))
        keys: dict[str, Any] = dict(a0=a0, k_k=k_k, k_a=k_a, r_k=r_k, scales=scales)
        y, final_state, checkpoints = WITH_KEYS.forward(*rows, state, bounds, save=True, bonus=bonus, **keys)
        out = torch.empty_like(g)
        given = dict(y=y, v=v, g=g, bonus=bonus, weight=weight, bias=bias)
        call("bonus_gate_forward", y, given | dict(out=out), eps=eps, **head_sizes(y))
        ctx.save_for_backward(*rows, state, bounds, checkpoints, *keys.values(), *given.values())
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return out, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, gfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        kept, keys = saved[:8], dict(zip(("a0", "k_k", "k_a", "r_k", "scales"), saved[8:]))
        gy = gv = gg = None
        if grad is None and gfinal is None:
            return (None,) * 16
        if grad is not None:
            given = dict(zip(("y", "v", "g", "bonus", "weight", "bias"), saved[13:]))
            y = given["y"]
            gy, gv, gg, gbonus = (torch.empty_like(given[name]) for name in ("y", "v", "g", "bonus"))
            given |= dict(grad=grad, gy=gy, gv=gv, gg=gg, gbonus=gbonus)
            call("bonus_gate_backward", y, given, eps=ctx.eps, **head_sizes(y))
            keys["gbonus"] = gbonus
        *found, gstate = WITH_KEYS.backward(*kept, gy, gfinal, **keys)
        return None, None if kept[5] is None else gstate, None, *found, gv, gg, *6 * (None,)
