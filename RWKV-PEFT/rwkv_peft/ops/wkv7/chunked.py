"""The chunked form of wkv7 in plain torch as a backend, for any device: products of matrices instead of single steps.

With c the sums of the decays' logarithms from a chunk's start, the factors exp(c) and 1 / exp(c) turn the effects of a
chunk's steps on each other into triangular matrices (C, C), and those of earlier chunks into products with the state S.
The rows of U are S_{t-1} a_t, which depend on each other: a unit triangular system. The backward is derived by hand,
and takes the states between chunks from a second forward pass over a segment, never by stepping a state back, which
would lose accuracy with each division by a decay.

Chunkwise forms of the delta rule: Yang et al. 2024, arXiv 2406.06484; RWKV-7: Peng et al. 2025, arXiv 2503.14456.
Computes in float64 if the tensors are float64, else in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..recurrence.chunks import CHUNK, Call, segment_count
from .reference import DECAY_SCALE


def unavailable(level: str = "") -> None:
    """None: torch alone is enough."""


def checkpoint_count(r: Tensor, sequences: int) -> int:
    """The most states saved for backward."""
    return segment_count(r.shape[0], r.shape[1], sequences)


@dataclass(frozen=True)
class Products:
    """Some chunks' operands: G = B H heads, n chunks of C steps."""

    v: Tensor  # (G, n, C, N), like the next six
    incl: Tensor  # product of the decays up to a step, itself included
    excl: Tensor  # the same without itself
    wq: Tensor  # r incl
    wa: Tensor  # a excl
    kwi: Tensor  # k / incl
    bwi: Tensor  # b / incl
    fw: Tensor  # (G, n, 1, N), incl of the last step
    ab: Tensor  # (G, n, C, C), like the next four: the weights by which a step reads earlier steps' writes
    ak: Tensor
    qk: Tensor
    qb: Tensor
    inverse: Tensor  # (I - ab)⁻¹


def _prepare(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Products:
    logs = DECAY_SCALE * torch.sigmoid(w)
    sums = logs.cumsum(-2)
    incl, excl = sums.exp(), (sums - logs).exp()
    wq, wa, kwi, bwi = r * incl, a * excl, k / incl, b / incl
    ab, ak = (wa @ bwi.mT).tril(-1), (wa @ kwi.mT).tril(-1)
    qk, qb = (wq @ kwi.mT).tril(), (wq @ bwi.mT).tril()
    identity = torch.eye(CHUNK, dtype=v.dtype, device=v.device)
    inverse = torch.linalg.solve_triangular(identity - ab, identity.expand_as(ab), upper=False, unitriangular=True)
    return Products(v, incl, excl, wq, wa, kwi, bwi, incl[..., -1:, :], ab, ak, qk, qb, inverse)


def _states(
    p: Products, first: int, S: Tensor, starts: dict[int, Tensor], ends: dict[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(states before each chunk, U, the state after the last), from chunk number `first` on, S before it. starts: a
    chunk -> the state that it begins with; ends: a chunk -> the tensor that gets the state after it."""
    own, through = p.inverse @ (p.ak @ p.v), p.inverse @ p.wa  # U = own + through Sᵀ
    bf, written = p.bwi * p.fw, p.v.mT @ (p.kwi * p.fw)
    states, us = [], []
    for c in range(p.v.shape[1]):
        S = starts.get(first + c, S)
        states.append(S)
        U = torch.baddbmm(own[:, c], through[:, c], S.mT)
        S = torch.baddbmm(torch.addcmul(written[:, c], S, p.fw[:, c]), U.mT, bf[:, c])
        us.append(U)
        if first + c in ends:
            ends[first + c].copy_(S)
    return torch.stack(states, 1), torch.stack(us, 1), S


FILLERS = (0.0, -torch.inf, 0.0, 0.0, 0.0, 0.0)  # r w k v a b of a step that does not change the state


def forward(*tensors: Any, save: bool, level: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """tensors: r w k v a b (B, T, H, N) of one dtype; state (n, H, N, N) or None; cu_seqlens (n + 1,) int64 or None
    -> y, final state, the states that the segments begin with (none unless `save`)."""
    *inputs, state, cu_seqlens = tensors
    call, r = Call(inputs, FILLERS, state, cu_seqlens), inputs[0]
    at = call.layout
    count = checkpoint_count(r, at.states) if save else 0
    checkpoints = call.initial.new_zeros(count, at.H, at.N, at.N)
    kept = checkpoints.view(-1, at.B * at.H, at.N, at.N)
    final, y = torch.empty_like(call.initial), call.empty(r)
    starts, ends = call.parts(call.initial, at.starts), call.parts(final, at.ends)
    S = starts[0]
    for number, (first, after) in enumerate(call.segments()):
        if save:
            kept[number] = S
        p = _prepare(*call.taken(first, after))
        states, U, S = _states(p, first, S, starts, ends)
        call.put(y, first, after, p.qk @ p.v + p.qb @ U + p.wq @ states.mT)
    return at.cut(y).contiguous(), final, checkpoints


def backward(*tensors: Any, level: str = "") -> tuple[Tensor, ...]:
    """tensors: forward's, checkpoints, and the gradients of y and of the final state (either None for zeros) -> the
    gradients of r w k v a b and state."""
    *inputs, state, cu_seqlens, checkpoints, gy, gfinal = tensors
    call, r = Call(inputs, FILLERS, state, cu_seqlens), inputs[0]
    at = call.layout
    kept = checkpoints.view(-1, at.B * at.H, at.N, at.N)
    gy = at.pad(torch.zeros_like(r) if gy is None else gy)
    gfinal, gstate = call.states(gfinal, r), torch.empty_like(call.initial)
    starts, begun = call.parts(call.initial, at.starts), call.parts(gstate, at.starts)
    ended = call.parts(gfinal, at.ends)
    outs = [call.empty(x) for x in inputs]
    dS = torch.zeros_like(kept[0])
    segments = call.segments()
    for number in reversed(range(len(segments))):
        first, after = segments[number]
        p = _prepare(*call.taken(first, after))
        states, U, _ = _states(p, first, kept[number], starts, {})
        dY = call.take(gy, first, after)
        dS, gradients = _backward_segment(p, states, U, dY, dS, first, begun, ended)
        dr, dl, *others = gradients
        sigmoids = torch.sigmoid(w_ := call.take(call.rows[1], first, after)) * torch.sigmoid(-w_)
        for out, x in zip(outs, (dr, DECAY_SCALE * sigmoids * dl, *others)):
            call.put(out, first, after, x)
    return *(at.cut(x).contiguous() for x in outs), gstate


def _backward_segment(
    p: Products,
    states: Tensor,
    U: Tensor,
    dY: Tensor,
    dS: Tensor,
    first: int,
    begun: Mapping[int, Tensor],
    ended: Mapping[int, Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(gradient of the state before the segment, gradients of r, log decay, k, v, a, b). states: S before each chunk;
    dS: gradient of the state after the segment; begun: a chunk -> the tensor that gets the gradient of the state before
    it; ended: a chunk -> the gradient of the state after it."""
    bf, kf = p.bwi * p.fw, p.kwi * p.fw
    own, through = p.inverse.mT @ (p.qb.mT @ dY), p.inverse.mT @ bf  # X = own + through dSᵀ
    read = dY.mT @ p.wq
    after, xs = [], []
    for c in reversed(range(dY.shape[1])):
        dS = ended.get(first + c, dS)
        after.append(dS)
        X = torch.baddbmm(own[:, c], through[:, c], dS.mT)
        dS = torch.baddbmm(torch.addcmul(read[:, c], dS, p.fw[:, c]), X.mT, p.wa[:, c])
        xs.append(X)
        if first + c in begun:
            begun[first + c].copy_(dS)
    D, X = torch.stack(after[::-1], 1), torch.stack(xs[::-1], 1)

    dv = p.qk.mT @ dY + kf @ D.mT + p.ak.mT @ X
    dab, dak = (X @ U.mT).tril(-1), (X @ p.v.mT).tril(-1)
    dqb, dqk = (dY @ U.mT).tril(), (dY @ p.v.mT).tril()
    vs, us = (p.v @ D) * p.fw, (U @ D) * p.fw
    dwq = dY @ states + dqk @ p.kwi + dqb @ p.bwi
    dwa = X @ states + dab @ p.bwi + dak @ p.kwi
    dkwi = dqk.mT @ p.wq + dak.mT @ p.wa + vs
    dbwi = dqb.mT @ p.wq + dab.mT @ p.wa + us

    # A decay's logarithm is part of incl from its own step on, and of excl from the next.
    g, h = dwq * p.wq - dkwi * p.kwi - dbwi * p.bwi, dwa * p.wa
    g[..., -1:, :] += (states * D).sum(-2, keepdim=True) * p.fw + (p.kwi * vs + p.bwi * us).sum(-2, keepdim=True)
    dl = (g + h).flip(-2).cumsum(-2).flip(-2) - h
    return dS, (dwq * p.incl, dl, dkwi / p.incl, dv, dwa * p.excl, dbwi / p.incl)
