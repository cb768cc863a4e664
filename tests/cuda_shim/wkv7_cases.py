"""Inputs for the wkv7 kernels, the true results in float64, and those of plain torch in low precision."""

from dataclasses import dataclass
from functools import partial

import torch

from cuda_shim import cases as wkv6_cases
from rwkv_peft.ops.wkv7 import cuda, reference

INPUTS = ("r", "w", "k", "v", "a", "b")
RESULTS = ("y", "final state", "gr", "gw", "gk", "gv", "ga", "gb", "gstate")
DECAYS = {"usual": (-6.0, 2.0), "none": (-40.0, -20.0), "strong": (6.0, 95.0), "mixed": (-8.0, 8.0)}  # bounds of w


@dataclass(frozen=True)
class Case:
    """r w k v a b gy (B, T, H, N) in one dtype, state and gfinal (n, H, N, N) float32 or None, cu_seqlens."""

    r: torch.Tensor
    w: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    gy: torch.Tensor
    gfinal: torch.Tensor | None

    @property
    def inputs(self):
        return tuple(getattr(self, name) for name in INPUTS)


def make_case(shape, dtype, *, decay="usual", with_state=True, lengths=None, repeated=False, seed=0):
    """A random case of a shape (B, T, H, N), with a and b as the model makes them: a direction to remove, and the same
    times a learning rate.

    lengths, whose sum is T, packs that many sequences into one row. repeated: all tokens share one direction and a
    learning rate of 1, so that each removes what the one before has written.
    """
    B, T, H, N = shape
    g = torch.Generator().manual_seed(seed)
    low, high = DECAYS[decay]
    r, k, v, direction, gy = (0.5 * torch.randn(B, T, H, N, generator=g) for _ in range(5))
    direction = torch.nn.functional.normalize(direction[:, :1].expand(B, T, H, N) if repeated else direction, dim=-1)
    rate = torch.ones(B, T, H, N) if repeated else torch.rand(B, T, H, N, generator=g)
    k = direction if repeated else k
    w = low + (high - low) * torch.rand(B, T, H, N, generator=g)
    bounds, states = wkv6_cases.bounds_and_states(shape, lengths, with_state, g)
    r, w, k, v, a, b, gy = (x.to(dtype).contiguous() for x in (r, w, k, v, -direction, direction * rate, gy))
    return Case(r, w, k, v, a, b, states[0], bounds, gy, states[1])


run = partial(wkv6_cases.run, cuda=cuda)


def truth(case):
    """The results in float64, by autograd through the reference."""
    return wkv6_cases.differentiate(case, torch.float64, reference.wkv7)


def plain(case):
    """The results of a plain torch loop that does everything in the case's dtype."""
    return wkv6_cases.differentiate(case, case.r.dtype, reference.wkv7 if case.r.dtype == torch.float32 else _loop)


def _loop(r, w, k, v, a, b, state, cu_seqlens):
    decay = torch.exp(reference.DECAY_SCALE * torch.sigmoid(w))

    def step(t, S):
        removed = S @ a[:, t, :, :, None]  # (B, H, N, 1)
        S = S * decay[:, t, :, None] + removed * b[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
        return (S @ r[:, t, :, :, None]).squeeze(-1), S

    return wkv6_cases.looped(step, r, state, cu_seqlens)
