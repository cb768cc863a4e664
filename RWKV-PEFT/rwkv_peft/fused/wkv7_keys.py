"""wkv7 with the keys before it and with each head's norm, the current token's bonus and the gate after it: one autograd
Function over CUDA kernels, for frozen parameters.

The recurrence's kernels compute the keys from the inputs of delta_keys, so that the keys are never written or read.
They also compute the bonus, because it reads r, k and v as the recurrence does: the forward kernel gives one number for
each token and head, and the backward kernel adds the bonus's part of the gradients of r and k, given that number's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops.mix.elements import head_sizes
from ..ops.mix.functions import call, differentiable_once, run
from ..ops.recurrence.checks import as_int64, check
from ..ops.wkv7.cuda import WITH_KEYS


def wkv7_with_keys(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    g: Tensor,
    r_k: Tensor,
    norm: torch.nn.GroupNorm,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm_bonus_gate of wkv7's result with the keys of delta_keys, and the final state.

    rows: r w k v low (B, T, H, N), k and low as in delta_keys; keys: its parameters a0 k_k k_a (1, 1, H N); state and
    cu_seqlens as in wkv7; g (B, T, H N), r_k (H, N), norm of H heads
    -> (B, T, H N), (B, H, N, N) float32.
    """
    check(WITH_KEYS.signature, rows, state, cu_seqlens)
    tensors = [x.contiguous() for x in (*rows, g, *keys, r_k, norm.weight, norm.bias)]
    state = None if state is None else state.float().contiguous()
    bounds = None if cu_seqlens is None else as_int64(cu_seqlens, g.shape[1])
    out: tuple[Tensor, Tensor] = run(WKV7WithKeys, torch.is_grad_enabled(), norm.eps, state, bounds, *tensors)
    return out


class WKV7WithKeys(Function):
    """save (True if backward may follow), eps, state (n, H, N, N) float32 or None, cu_seqlens int64 or None, r w k v
    low (B, T, H, N), g (B, T, H N), a0, k_k, k_a, r_k, weight and bias of H N elements, bfloat16 -> (B, T, H N), final
    state."""

    @staticmethod
    def forward(ctx: Any, save: bool, eps: float, state: Tensor | None, bounds: Tensor | None, *tensors: Tensor) -> Any:
        *rows, g, a0, k_k, k_a, r_k, weight, bias = tensors
        v = rows[3]
        bonus, scales = (g.new_empty(v.shape[:3], dtype=torch.float32) for _ in range(2))
        keys: dict[str, Any] = dict(a0=a0, k_k=k_k, k_a=k_a, r_k=r_k, scales=scales)
        y, final_state, checkpoints = WITH_KEYS.forward(*rows, state, bounds, save=save, bonus=bonus, **keys)
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
        if gv is not None:
            found[3] += gv
        return None, None, None if kept[5] is None else gstate, None, *found, gg, *6 * (None,)
