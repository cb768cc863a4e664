"""wkv6 with what stands around it in the model, its decay before it, each head's norm and its gate after: on a GPU one
autograd Function, whose kernels have the recurrence's rows and make these there."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..mix import norm_gate
from ..mix.functions import call, differentiable_once, run
from ..mix.heads import head_sizes
from ..mix.op import norms_fused
from ..native.launch import aligned
from ..recurrence.checks import as_int64, check
from ..recurrence.signature import sequences_of
from .cuda import GATED_SIZE, RECURRENCE, WITH_DECAY, WITH_GATE
from .op import WKV6, wkv6
from .signature import SIGNATURE

Decay = tuple[Tensor, Tensor, Tensor]


def wkv6_gated(
    rows: tuple[Tensor, Tensor, Tensor],
    decay: Decay,
    u: Tensor,
    g: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm_gate of what wkv6 gives, and the final state.

    rows: r k v (B, T, H, N); decay: what w is made of, low (B, T, D), up (D, H N) and a parameter of H N elements, w =
    parameter + low up; u (H, N), state and cu_seqlens as wkv6 takes them; g (B, T, H N), weight and bias (H N,)
    -> (B, T, H N), (B, H, N, N) float32.
    """
    r, k, v = rows
    if not _in_one(r, k, v, g, *decay, weight, bias):
        y, state = wkv6(r, k, v, made(decay, r), u, state, cu_seqlens)
        return norm_gate(y, g, weight, bias, eps), state
    w = None if _makes_decay(r, decay, cu_seqlens) else made(decay, r)
    check(SIGNATURE, (r, k, v, v if w is None else w, u), state, cu_seqlens)
    given = (r, k, v, w, u.float(), g, weight, bias, *(decay if w is None else (None,) * 3))
    tensors = [None if x is None else x.contiguous() for x in given]
    state = None if state is None else state.float().contiguous()
    bounds = None if cu_seqlens is None else as_int64(cu_seqlens, r.shape[1])
    save = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in (*tensors, state)])
    return run(WKV6Gated, save, eps, state, bounds, *tensors)


def made(decay: Decay, r: Tensor) -> Tensor:
    """w, of r's shape (B, T, H, N), by a library's product."""
    low, up, parameter = decay
    return F.linear(low, up.t(), parameter.flatten()).view(r.shape)


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


def _makes_decay(r: Tensor, decay: Decay, cu_seqlens: Tensor | None) -> bool:
    """Whether the kernels make w as well: its parameters are frozen, they have its rank, and time is not split, whose
    passes over groups read w."""
    low, *parameters = decay
    return (
        low.shape[-1] in WITH_DECAY
        and not any([x.requires_grad for x in parameters])
        and not RECURRENCE.group_of(r, sequences_of(r, cu_seqlens))
    )


def _of_decay(low: Tensor | None, up: Tensor | None, parameter: Tensor | None) -> dict[str, Tensor | None]:
    """What the kernels that make w take."""
    return dict(low=aligned(low), up=aligned(up), decay=aligned(parameter))


class WKV6Gated(Function):
    """Whether backward will come, eps, state (n, H, N, N) float32 or None, cu_seqlens int64 or None, r k v (B, T, H, N)
    and w, or None, u (H, N) float32, g (B, T, H N), weight and bias (H N,), bfloat16; where w is None, what it is made
    of, low (B, T, D), up (D, H N) and a parameter of H N elements, else None -> (B, T, H N), final state.

    Made inside, w is no tensor: backward's kernel makes it again, in the same bits."""

    @staticmethod
    def forward(
        ctx: Any, save: bool, eps: float, state: Tensor | None, bounds: Tensor | None, *tensors: Tensor | None
    ) -> Any:
        *inputs, g, weight, bias, low, up, parameter = tensors
        assert g is not None
        out = torch.empty_like(g)
        further: dict[str, Any] = dict(g=aligned(g), weight=weight, bias=bias, out=out, eps=eps)
        kernels = WITH_GATE
        if low is not None:
            kernels = WITH_DECAY[low.shape[-1]]
            further |= _of_decay(low, up, parameter)
        y, final_state, checkpoints = kernels.forward(*inputs, state, bounds, save=save, **further)
        if save:
            ctx.save_for_backward(*inputs, state, bounds, checkpoints, y, g, weight, bias, low, up, parameter)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return out, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, gfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None and gfinal is None:
            return (None,) * 15
        *kept, y, g, weight, bias, low, up, parameter = ctx.saved_tensors
        r, (state, bounds, _) = kept[0], kept[-3:]
        gg: Tensor | None = torch.empty_like(g)
        given = dict(y=y, g=aligned(g), weight=weight, bias=bias, gg=gg)
        if low is not None:
            grad = torch.zeros_like(g) if grad is None else grad
            kernels, given = WITH_DECAY[low.shape[-1]], given | _of_decay(low, up, parameter)
            *found, gstate = kernels.backward(*kept, grad, gfinal, eps=ctx.eps, **given)
        elif grad is None:
            gg = None
            *found, gstate = RECURRENCE.backward(*kept, None, gfinal)
        elif RECURRENCE.group_of(r, sequences_of(r, bounds)):  # the pass over groups reads y's gradient, too
            gy = torch.empty_like(y)
            call("norm_gate_backward", y, given | dict(grad=grad, gy=gy), eps=ctx.eps, **head_sizes(y))
            *found, gstate = RECURRENCE.backward(*kept, gy, gfinal)
        else:
            *found, gstate = WITH_GATE.backward(*kept, grad, gfinal, eps=ctx.eps, **given)
        gr, gk, gv, gw, gu = found
        of_w, of_low = (gw, None) if low is None else (None, F.linear(gw.flatten(2), up))
        of_state = None if state is None else gstate
        return None, None, of_state, None, gr, gk, gv, of_w, gu, gg, None, None, of_low, None, None
