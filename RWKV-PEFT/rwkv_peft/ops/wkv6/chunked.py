"""The products of wkv6's chunked form.

A step t reads an earlier step s of its chunk by the weight r_t · (d_{s+1} … d_{t-1} k_s), with d the decays. A chunk is
halved again and again, until each such pair lies on both sides of one middle. There the decays split into those from s
to the middle, which go to k, and those from the middle to t, which go to r, and a product of matrices gives all pairs
of a middle. All factors are products of decays, at most 1: nothing overflows, nothing is divided, and a decay of 0 does
no harm. Earlier chunks are read by a product with the state S. The backward is derived by hand, and takes the states
between chunks from a second forward pass over a segment.

Chunkwise forms of gated linear attention: Yang et al. 2023, arXiv 2312.06635; RWKV-6: Peng et al. 2024, arXiv
2404.05892. Computes in float64 if the tensors are float64, else in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recurrence.chunked import CHUNK, Chunked, Parts
from .reference import LARGEST_W

FILLERS = (0.0, 0.0, 0.0, -torch.inf)  # r k v w of a step that does not change the state
HALVES = tuple(2**n for n in range(CHUNK.bit_length() - 1))  # steps on each side of a middle
MOST_CHUNKS, LEAST_CHUNKS = 64, 8  # of a segment: with few rows launches cost most of the time, with many rows memory


def _before(x: Tensor) -> Tensor:
    """For each step, the sum of x (..., C, N) over all steps before it."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def _after(x: Tensor) -> Tensor:
    """For each step, the sum of x (..., C, N) over all steps after it."""
    return _before(x.flip(-2)).flip(-2)


class Sides(NamedTuple):
    """The factors on both sides of every middle: r with the decays since it, k with those up to it, (..., half, N)."""

    since: Tensor
    r: Tensor
    until: Tensor
    k: Tensor


class Products(NamedTuple):
    """Some chunks' operands: G = B H heads, n chunks of C steps."""

    r: Tensor  # (G, n, C, N), like the next three
    k: Tensor
    v: Tensor
    logs: Tensor  # the decays' logarithms
    u: Tensor  # (G, 1, 1, N)
    own: Tensor  # (G, n, C, C), the weights by which a step reads its chunk's writes
    halves: tuple[Sides, ...]  # one for each of HALVES
    whole: Sides  # r with the decays since the chunk's first step, k with those up to its last, (G, n, C, N)
    kept: Tensor  # (G, n, N, 1), the share of the state that is left after a chunk


def _split(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """x (..., C, N) before and after each middle, (..., C / 2 half, half, N)."""
    before, after = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return before, after


def _pairs(x: Tensor, half: int) -> Tensor:
    """A view of x (G, n, C, C): the pairs of steps on both sides of each middle, (G, n, C / 2 half, half, half)."""
    blocks = x.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half)).diagonal(0, 2, 5)  # (G, n, 2, half, 2, half, m)
    return blocks[:, :, 1, :, 0].movedim(-1, 2)


def _sides(r: Tensor, k: Tensor, r_logs: Tensor, k_logs: Tensor) -> Sides:
    since, until = _before(r_logs).exp(), _after(k_logs).exp()
    return Sides(since, r * since, until, k * until)


def _prepare(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Products:
    logs = -w.clamp(max=LARGEST_W).exp()
    own = torch.diag_embed((r * u * k).sum(-1))
    halves = []
    for half in HALVES:
        (k_first, r_last), (first, last) = (_split(k, half)[0], _split(r, half)[1]), _split(logs, half)
        halves.append(sides := _sides(r_last, k_first, last, first))
        _pairs(own, half).copy_(sides.r @ sides.k.mT)
    kept = logs.sum(-2).exp()[..., None]
    return Products(r, k, v, logs, u, own, tuple(halves), _sides(r, k, logs, logs), kept)


def _states(p: Products, first: int, S: Tensor, starts: Parts, ends: Parts) -> tuple[tuple[Tensor], Tensor]:
    written = p.whole.k.mT @ p.v
    states = []
    for c in range(p.v.shape[1]):
        S = starts.get(first + c, S)
        states.append(S)
        S = torch.addcmul(written[:, c], p.kept[:, c], S)
        if first + c in ends:
            ends[first + c].copy_(S)
    return (torch.stack(states, 1),), S


def _output(p: Products, states: Tensor) -> Tensor:
    return p.own @ p.v + p.whole.r @ states


def _gradients(
    p: Products, read: tuple[Tensor, ...], dY: Tensor, dS: Tensor, first: int, begun: Parts, ended: Parts
) -> tuple[Tensor, tuple[Tensor, ...]]:
    wanted = p.whole.r.mT @ dY
    after = []
    for c in reversed(range(dY.shape[1])):
        dS = ended.get(first + c, dS)
        after.append(dS)
        dS = torch.addcmul(wanted[:, c], p.kept[:, c], dS)
        if first + c in begun:
            begun[first + c].copy_(dS)
    return dS, _input_gradients(p, read[0], torch.stack(after[::-1], 1), dY)


def _input_gradients(p: Products, states: Tensor, D: Tensor, dY: Tensor) -> tuple[Tensor, ...]:
    """Gradients of r, k, v, w (G, n, C, N) and u (G, 1, 1, N). states: S before each chunk; D: gradients of those after
    each."""
    dv = p.own.mT @ dY + p.whole.k @ D
    down = dY @ p.v.mT
    direct = down.diagonal(0, -2, -1)[..., None]
    dr, dk, du = direct * p.u * p.k, direct * p.u * p.r, (direct * p.r * p.k).sum((1, 2), keepdim=True)
    lost = (states * D).sum(-1)[..., None, :] * p.kept.mT  # (G, n, 1, N), of each decay's logarithm
    dlogs = lost.expand_as(p.logs).contiguous()
    _add_sides(p.whole, dY @ states.mT, p.v @ D.mT, (dr, dk, dlogs, dlogs))
    for half, sides in zip(HALVES, p.halves):
        pairs = _pairs(down, half)
        (first_dk, last_dr), (first, last) = (_split(dk, half)[0], _split(dr, half)[1]), _split(dlogs, half)
        _add_sides(sides, pairs @ sides.k, pairs.mT @ sides.r, (last_dr, first_dk, last, first))
    return dr, dk, dv, dlogs * p.logs, du  # w above LARGEST_W: the decay is 0, and so is the gradient


def _add_sides(sides: Sides, d_r: Tensor, d_k: Tensor, into: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Add the gradients of the sides' r and k to those of the plain r and k, and to that of the decays' logarithms."""
    dr, dk, since, until = into
    dr.addcmul_(d_r, sides.since)
    dk.addcmul_(d_k, sides.until)
    since += _after(d_r * sides.r)
    until += _before(d_k * sides.k)


CHUNKED = Chunked(FILLERS, _prepare, _states, _output, _gradients, lambda B: max(LEAST_CHUNKS, MOST_CHUNKS // B))
