"""The chunked form of wkv6 in plain torch as a backend, for any device: products of matrices instead of single steps.

A step t reads an earlier step s of its chunk by the weight r_t · (d_{s+1} … d_{t-1} k_s), with d the decays. A chunk is
halved again and again, until each such pair lies on both sides of one middle. There the decays split into those from s
to the middle, which go to k, and those from the middle to t, which go to r, and a product of matrices gives all pairs
of a middle. All factors are products of decays, at most 1: nothing overflows, nothing is divided, and a decay of 0 does
no harm. Earlier chunks are read by a product with the state S. The backward is derived by hand, and takes the states
between chunks from a second forward pass over a segment.

Chunkwise forms of gated linear attention: Yang et al. 2023, arXiv 2312.06635; RWKV-6: Peng et al. 2024, arXiv
2404.05892. Computes in float64 if the tensors are float64, else in float32.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recurrence.chunks import CHUNK, Call, segment_count
from .reference import LARGEST_W

FILLERS = (0.0, 0.0, 0.0, -torch.inf)  # r k v w of a step that does not change the state
HALVES = tuple(2**n for n in range(CHUNK.bit_length() - 1))  # steps on each side of a middle
MOST_CHUNKS, LEAST_CHUNKS = 64, 8  # of a segment: with few rows launches cost most of the time, with many rows memory


def unavailable(level: str = "") -> None:
    """None: torch alone is enough."""


def checkpoint_count(r: Tensor, sequences: int) -> int:
    """The most states saved for backward."""
    return segment_count(r.shape[0], r.shape[1], sequences, _segment(r.shape[0]))


def _segment(B: int) -> int:
    """The number of chunks in a segment of B rows."""
    return max(LEAST_CHUNKS, MOST_CHUNKS // B)


def _before(x: Tensor) -> Tensor:
    """For each step, the sum of x (..., C, N) over all steps before it."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def _behind(x: Tensor) -> Tensor:
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
    before, behind = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return before, behind


def _pairs(x: Tensor, half: int) -> Tensor:
    """A view of x (G, n, C, C): the pairs of steps on both sides of each middle, (G, n, C / 2 half, half, half)."""
    blocks = x.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half)).diagonal(0, 2, 5)  # (G, n, 2, half, 2, half, m)
    return blocks[:, :, 1, :, 0].movedim(-1, 2)


def _sides(r: Tensor, k: Tensor, r_logs: Tensor, k_logs: Tensor) -> Sides:
    since, until = _before(r_logs).exp(), _behind(k_logs).exp()
    return Sides(since, r * since, until, k * until)


def _prepare(u: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Products:
    logs = -w.clamp(max=LARGEST_W).exp()
    own = torch.diag_embed((r * u * k).sum(-1))
    halves = []
    for half in HALVES:
        (k_first, r_last), (first, last) = (_split(k, half)[0], _split(r, half)[1]), _split(logs, half)
        halves.append(sides := _sides(r_last, k_first, last, first))
        _pairs(own, half).copy_(sides.r @ sides.k.mT)
    kept = logs.sum(-2).exp()[..., None]
    return Products(r, k, v, logs, u, own, tuple(halves), _sides(r, k, logs, logs), kept)


def _states(
    p: Products, first: int, S: Tensor, starts: Mapping[int, Tensor], ends: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """(states before each chunk, the state after the last), from chunk number `first` on, S before it. starts: a chunk
    -> the state that it begins with; ends: a chunk -> the tensor that gets the state after it."""
    written = p.whole.k.mT @ p.v
    states = []
    for c in range(p.v.shape[1]):
        S = starts.get(first + c, S)
        states.append(S)
        S = torch.addcmul(written[:, c], p.kept[:, c], S)
        if first + c in ends:
            ends[first + c].copy_(S)
    return torch.stack(states, 1), S


def _bonus(u: Tensor, call: Call) -> Tensor:
    """u (H, N) for each row and head, (G, 1, 1, N)."""
    at = call.layout
    return u.to(call.dtype).expand(at.B, at.H, at.N).reshape(-1, 1, 1, at.N)


def forward(*tensors: Any, save: bool, level: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """tensors: r k v w (B, T, H, N) of one dtype, u (H, N); state (n, H, N, N) or None; cu_seqlens (n + 1,) int64 or
    None -> y, final state, the states that the segments begin with (none unless `save`)."""
    *rows, u, state, cu_seqlens = tensors
    call, r = Call(rows, FILLERS, state, cu_seqlens, _segment(rows[0].shape[0])), rows[0]
    at = call.layout
    count = checkpoint_count(r, at.states) if save else 0
    checkpoints = call.initial.new_zeros(count, at.H, at.N, at.N)
    kept = checkpoints.view(-1, at.B * at.H, at.N, at.N)
    final, y, bonus = torch.empty_like(call.initial), call.empty(r), _bonus(u, call)
    starts, ends = call.parts(call.initial, at.starts), call.parts(final, at.ends)
    S = starts[0]
    for number, (first, after) in enumerate(call.segments()):
        if save:
            kept[number] = S
        p = _prepare(bonus, *call.taken(first, after))
        states, S = _states(p, first, S, starts, ends)
        call.put(y, first, after, p.own @ p.v + p.whole.r @ states)
    return at.cut(y).contiguous(), final, checkpoints


def backward(*tensors: Any, level: str = "") -> tuple[Tensor, ...]:
    """tensors: forward's, checkpoints, and the gradients of y and of the final state (either None for zeros) -> the
    gradients of r k v w u and state."""
    *rows, u, state, cu_seqlens, checkpoints, gy, gfinal = tensors
    call, r = Call(rows, FILLERS, state, cu_seqlens, _segment(rows[0].shape[0])), rows[0]
    at = call.layout
    kept = checkpoints.view(-1, at.B * at.H, at.N, at.N)
    gy = at.pad(torch.zeros_like(r) if gy is None else gy)
    gfinal, gstate, bonus = call.states(gfinal, r), torch.empty_like(call.initial), _bonus(u, call)
    starts, begun = call.parts(call.initial, at.starts), call.parts(gstate, at.starts)
    ended = call.parts(gfinal, at.ends)
    outs = [call.empty(x) for x in rows]
    dS, du = torch.zeros_like(kept[0]), torch.zeros_like(bonus)
    segments = call.segments()
    for number in reversed(range(len(segments))):
        first, after = segments[number]
        p = _prepare(bonus, *call.taken(first, after))
        states, _ = _states(p, first, kept[number], starts, {})
        dY = call.take(gy, first, after)
        D, dS = _state_gradients(p, dY, dS, first, begun, ended)
        *gradients, own_du = _gradients(p, states, D, dY)
        du += own_du
        for out, x in zip(outs, gradients):
            call.put(out, first, after, x)
    gu = du.view(at.B, at.H, at.N).sum(0).to(u.dtype)
    return *(at.cut(x).contiguous() for x in outs), gu, gstate


def _state_gradients(
    p: Products, dY: Tensor, dS: Tensor, first: int, begun: Mapping[int, Tensor], ended: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """(gradients of the states after each chunk, that of the state before the segment). dS: gradient of the state after
    the segment; begun: a chunk -> the tensor that gets the gradient of the state before it; ended: a chunk -> the
    gradient of the state after it."""
    read = p.whole.r.mT @ dY
    after = []
    for c in reversed(range(dY.shape[1])):
        dS = ended.get(first + c, dS)
        after.append(dS)
        dS = torch.addcmul(read[:, c], p.kept[:, c], dS)
        if first + c in begun:
            begun[first + c].copy_(dS)
    return torch.stack(after[::-1], 1), dS


def _gradients(p: Products, states: Tensor, D: Tensor, dY: Tensor) -> tuple[Tensor, ...]:
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
    since += _behind(d_r * sides.r)
    until += _before(d_k * sides.k)
