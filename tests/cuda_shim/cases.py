"""Inputs for the wkv6 kernels, the true results in float64, and those of plain torch in low precision."""

from dataclasses import dataclass, replace
from unittest.mock import patch

import torch

from rwkv_peft.ops.wkv6 import cuda, reference

RESULTS = ("y", "final state", "gr", "gk", "gv", "gw", "gu", "gstate")


@dataclass(frozen=True)
class Case:
    """r k v w gy (B, T, H, N) in one dtype, u (H, N), state and gfinal (n, H, N, N) float32 or None, cu_seqlens."""

    r: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    w: torch.Tensor
    u: torch.Tensor
    state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    gy: torch.Tensor
    gfinal: torch.Tensor | None

    @property
    def inputs(self):
        return self.r, self.k, self.v, self.w, self.u


def decays(kind, shape, generator):
    """Raw w: "ordinary" decays, "none" (exp(-exp(w)) rounds to 1), "all" (it underflows), or a "mix" of all."""
    ordinary = torch.rand(shape, generator=generator) * 7 - 6
    none, everything = torch.full(shape, -20.0), torch.rand(shape, generator=generator) * 90 + 5
    strong = torch.rand(shape, generator=generator) * 5
    choice = torch.randint(4, shape, generator=generator)
    mix = torch.stack([ordinary, none, everything, strong]).gather(0, choice[None])[0]
    return {"ordinary": ordinary, "none": none, "all": everything, "mix": mix}[kind]


def make_case(shape, dtype, *, decay="ordinary", with_state=True, lengths=None, seed=0):
    """A random case of a shape (B, T, H, N). `lengths`, whose sum is T, packs that many sequences into one row."""
    B, T, H, N = shape
    g = torch.Generator().manual_seed(seed)
    r, k, v, gy = (0.5 * torch.randn(B, T, H, N, generator=g) for _ in range(4))
    n = B if lengths is None else len(lengths)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    states = [scale * torch.randn(n, H, N, N, generator=g) if with_state else None for scale in (0.3, 0.1)]
    w = decays(decay, (B, T, H, N), g)
    r, k, v, w, gy = (x.to(dtype) for x in (r, k, v, w, gy))
    u = 0.5 * torch.randn(H, N, generator=g)
    return Case(r, k, v, w, u, states[0], bounds, gy, states[1])


def run(kernels, case, group=0, cuda=cuda):
    """The kernels' results, in the order of RESULTS, without gstate if there is no state. group: the tokens of a group
    if time is split; cuda: the recurrence's cuda.py."""
    given = (*case.inputs, case.state, case.cu_seqlens)
    with patch.object(cuda.FAMILY, "kernels", lambda device: kernels):
        y, final, checkpoints = cuda.RECURRENCE.forward(*given, save=True, group=group)
        gradients = cuda.RECURRENCE.backward(*given, checkpoints, case.gy, case.gfinal, group=group)
    return (y, final, *gradients)[: None if case.state is not None else -1]


def truth(case):
    """The results in float64, by autograd through the reference."""
    return differentiate(case, torch.float64, reference.wkv6)


def plain(case):
    """The results of a plain torch loop that does everything in the case's dtype."""
    return differentiate(case, case.r.dtype, reference.wkv6 if case.r.dtype == torch.float32 else _loop)


def differentiate(case, dtype, forward):
    """The results of a function of a recurrence's inputs in a dtype, by autograd."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (*case.inputs, case.state)]
    y, final = forward(*leaves, case.cu_seqlens)
    loss = (y * case.gy.to(dtype)).sum()
    if case.gfinal is not None:
        loss = loss + (final * case.gfinal.to(dtype)).sum()
    leaves = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    # gw of wkv6 is 0 times infinity where exp(w) overflows; the true value is 0.
    gradients = [torch.zeros_like(x) if g is None else g.nan_to_num(nan=0.0) for x, g in zip(leaves, gradients)]
    return [x.detach() for x in (y, final, *gradients)]


def _loop(r, k, v, w, u, state, cu_seqlens):
    B, T, H, N = r.shape
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    decay = torch.exp(-torch.exp(w))
    ys, finals = [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        S = r.new_zeros(B, H, N, N) if state is None else state if cu_seqlens is None else state[n : n + 1]
        for t in range(start, end):
            kv = k[:, t, :, :, None] * v[:, t, :, None, :]
            ys.append((r[:, t, :, :, None] * (S + u[:, :, None] * kv)).sum(-2))
            S = decay[:, t, :, :, None] * S + kv
        finals.append(S)
    return torch.stack(ys, dim=1), torch.cat(finals)


def rms(x):
    return x.double().square().mean().sqrt().item()


def error(x, true):
    """Root mean square of x - true."""
    return rms(x.double() - true)


def check_empty_ends(raised, results):
    """Assert that empty sequences at the end of a case change no bit of the results {name: tensor} of the others, and
    pass on their states."""
    kept = int((raised.cu_seqlens.diff() > 0).sum())
    case = replace(
        raised, state=raised.state[:kept], gfinal=raised.gfinal[:kept], cu_seqlens=raised.cu_seqlens[: kept + 1]
    )
    found, expected = results(raised), results(case)
    for name, x in found.items():
        if name in ("final state", "gstate"):
            own = raised.state if name == "final state" else raised.gfinal
            x, handed_on = x[:kept], x[kept:]
            assert len(handed_on) and torch.equal(handed_on, own[kept:])
        assert torch.equal(x, expected[name]), name
