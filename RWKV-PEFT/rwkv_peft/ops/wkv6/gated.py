"""wkv6 with what follows it, each head's norm and its gate: on a GPU one autograd Function, whose kernels have the
recurrence's rows and make both there."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..mix import norm_gate
from ..mix.functions import call, differentiable_once, run
from ..mix.heads import head_sizes
from ..mix.op import norms_fused
from ..native.launch import aligned
from ..recurrence.checks import as_int64, check
from ..recurrence.signature import sequences_of
from .cuda import GATED_SIZE, RECURRENCE, WITH_GATE
from .op import WKV6, wkv6
from .signature import SIGNATURE


def wkv6_gated(
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    u: Tensor,
    g: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm_gate of what wkv6 gives, and the final state.

    rows: r k v w (B, T, H, N); u (H, N), state and cu_seqlens as wkv6 takes them; g (B, T, H N), weight and bias
    (H N,) -> (B, T, H N), (B, H, N, N) float32.
    """
    if not _in_one(*rows, g, weight, bias):
        y, state = wkv6(*rows, u, state, cu_seqlens)
        return norm_gate(y, g, weight, bias, eps), state
    check(SIGNATURE, (*rows, u), state, cu_seqlens)
    tensors = [x.contiguous() for x in (*rows, u.float(), g, weight, bias)]
    state = None if state is None else state.float().contiguous()
    bounds = None if cu_seqlens is None else as_int64(cu_seqlens, rows[0].shape[1])
    save = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in (*tensors, state)])
    return run(WKV6Gated, save, eps, state, bounds, *tensors)


def _in_one(*tensors: Tensor) -> bool:
    """Whether these, of which the last two are the norm's parameters, go through the Function: the parameters are
    frozen, and the gated kernels take the rest."""
    r, *parameters = tensors[0], *tensors[-2:]
    return (
        r.dtype == torch.bfloat16
        and r.shape[-1] == GATED_SIZE
        and not any([x.requires_grad for x in parameters])
        and norms_fused(*tensors)
        and WKV6.backends.choose("auto", r.device.type, r.device.index, r.dtype) == "cuda"
    )


class WKV6Gated(Function):
    """Whether backward will come, eps, state (n, H, N, N) float32 or None, cu_seqlens int64 or None, r k v w
    (B, T, H, N), u (H, N) float32, g (B, T, H N), weight and bias (H N,), bfloat16 -> (B, T, H N), final state."""

    @staticmethod
    def forward(ctx: Any, save: bool, eps: float, state: Tensor | None, bounds: Tensor | None, *tensors: Tensor) -> Any:
        *inputs, g, weight, bias = tensors
        out = torch.empty_like(g)
        further: dict[str, Any] = dict(g=aligned(g), weight=weight, bias=bias, out=out, eps=eps)
        y, final_state, checkpoints = WITH_GATE.forward(*inputs, state, bounds, save=save, **further)
        if save:
            ctx.save_for_backward(*inputs, state, bounds, checkpoints, y, g, weight, bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return out, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, gfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None and gfinal is None:
            return (None,) * 12
        *kept, y, g, weight, bias = ctx.saved_tensors
        r, (state, bounds, _) = kept[0], kept[-3:]
        gg = None
        if grad is None:
            *found, gstate = RECURRENCE.backward(*kept, None, gfinal)
        else:
            gg = torch.empty_like(g)
            given = dict(y=y, g=aligned(g), weight=weight, bias=bias, gg=gg)
            if RECURRENCE.group_of(r, sequences_of(r, bounds)):  # the pass over groups reads y's gradient, too
                gy = torch.empty_like(y)
                call("norm_gate_backward", y, given | dict(grad=grad, gy=gy), eps=ctx.eps, **head_sizes(y))
                *found, gstate = RECURRENCE.backward(*kept, gy, gfinal)
            else:
                *found, gstate = WITH_GATE.backward(*kept, grad, gfinal, eps=ctx.eps, **given)
        return None, None, None if state is None else gstate, None, *found, gg, None, None
