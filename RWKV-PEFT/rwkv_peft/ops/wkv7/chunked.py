"""The products of wkv7's chunked form.

With c the sums of the decays' logarithms from a chunk's start, the factors exp(c) and 1 / exp(c) turn the effects of a
chunk's steps on each other into triangular matrices (C, C), and those of earlier chunks into products with the state S.
The rows of U are S_{t-1} a_t, which depend on each other: a unit triangular system. The backward is derived by hand.
Its states come from a second forward pass and never from stepping a state back, which would lose accuracy with each
division by a decay.

Chunkwise forms of the delta rule: Yang et al. 2024, arXiv 2406.06484; RWKV-7: Peng et al. 2025, arXiv 2503.14456.
Computes in float64 if the tensors are float64, else in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..recurrence.chunked import CHUNK, Chunked, Parts
from .reference import DECAY_SCALE

FILLERS = (0.0, -torch.inf, 0.0, 0.0, 0.0, 0.0)  # r w k v a b of a step that does not change the state


@dataclass(frozen=True)
class Products:
    """Some chunks' operands: G = B H heads, n chunks of C steps."""

    w: Tensor  # (G, n, C, N), like the next seven
    v: Tensor
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
    return Products(w, v, incl, excl, wq, wa, kwi, bwi, incl[..., -1:, :], ab, ak, qk, qb, inverse)


def _states(p: Products, first: int, S: Tensor, starts: Parts, ends: Parts) -> tuple[tuple[Tensor, Tensor], Tensor]:
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
    return (torch.stack(states, 1), torch.stack(us, 1)), S


def _output(p: Products, states: Tensor, U: Tensor) -> Tensor:
    return p.qk @ p.v + p.qb @ U + p.wq @ states.mT


def _gradients(
    p: Products, before: tuple[Tensor, ...], dY: Tensor, dS: Tensor, first: int, begun: Parts, ended: Parts
) -> tuple[Tensor, tuple[Tensor, ...]]:
    states, U = before
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
    sigmoids = torch.sigmoid(p.w) * torch.sigmoid(-p.w)
    return dS, (dwq * p.incl, DECAY_SCALE * sigmoids * dl, dkwi / p.incl, dv, dwa * p.excl, dbwi / p.incl)


CHUNKED = Chunked(FILLERS, _prepare, _states, _output, _gradients)
