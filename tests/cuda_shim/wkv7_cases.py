"""Inputs for the wkv7 kernels, the true results in float64, and those of plain torch in low precision."""

from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch

from cuda_shim import cases as wkv6_cases
from rwkv_peft.ops.wkv7 import cuda, reference

INPUTS = ("r", "w", "k", "v", "a", "b")
RESULTS = ("y", "final state", "gr", "gw", "gk", "gv", "ga", "gb", "gstate")
KEYS_RESULTS = ("y", "final state", "bonus", "gr", "gw", "gk", "gv", "glow", "gstate")
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
    n = B if lengths is None else len(lengths)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    states = [scale * torch.randn(n, H, N, N, generator=g) if with_state else None for scale in (0.3, 0.1)]
    r, w, k, v, a, b, gy = (x.to(dtype).contiguous() for x in (r, w, k, v, -direction, direction * rate, gy))
    return Case(r, w, k, v, a, b, states[0], bounds, gy, states[1])


run = partial(wkv6_cases.run, cuda=cuda)


@dataclass(frozen=True)
class KeysCase:
    """A case whose kernels make the keys from its k and from low (B, T, H, N), with parameters (H, N), and the gradient
    of the bonuses (B, T, H) float32 or None."""

    case: Case
    low: torch.Tensor
    a0: torch.Tensor
    k_k: torch.Tensor
    k_a: torch.Tensor
    r_k: torch.Tensor
    gbonus: torch.Tensor | None

    @property
    def parameters(self):
        return dict(a0=self.a0, k_k=self.k_k, k_a=self.k_a, r_k=self.r_k)

    @property
    def inputs(self):
        return self.case.r, self.case.w, self.case.k, self.case.v, self.low


def make_keys_case(B, T, H, *, with_bonus=True, **kinds):
    """A random KeysCase in bfloat16, with head size 64; kinds: as in make_case."""
    g = torch.Generator().manual_seed(1 + kinds.get("seed", 0))
    low, a0, k_k, k_a, r_k = (torch.randn(*shape, generator=g) for shape in ((B, T, H, 64), *4 * [(H, 64)]))
    tensors = (x.bfloat16() for x in (3 * low, a0, 0.8 + 0.2 * k_k, 1 + 0.2 * k_a, 0.3 * r_k))
    gbonus = torch.randn(B, T, H, generator=g) if with_bonus else None
    return KeysCase(make_case((B, T, H, 64), torch.bfloat16, **kinds), *tensors, gbonus)


def run_keys(kernels, made, group=0):
    """`run` for the kernels that make their keys: results in the order of KEYS_RESULTS."""
    case = made.case
    bonus, scales = (case.r.new_empty(case.r.shape[:3], dtype=torch.float32) for _ in range(2))
    given, further = (*made.inputs, case.state, case.cu_seqlens), made.parameters | dict(scales=scales)
    of_bonus = {} if made.gbonus is None else dict(gbonus=made.gbonus)
    with patch.object(cuda.FAMILY, "kernels", lambda device: kernels):
        y, final, checkpoints = cuda.WITH_KEYS.forward(*given, save=True, group=group, bonus=bonus, **further)
        saved = (checkpoints, case.gy, case.gfinal)
        gradients = cuda.WITH_KEYS.backward(*given, *saved, group=group, **further, **of_bonus)
    return (y, final, bonus, *gradients)[: None if case.state is not None else -1]


def keys_in(made, dtype):
    """The results in plain torch, all of it in dtype, by autograd through delta_keys' formula and the recurrence."""
    case = made.case
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (*made.inputs, case.state)]
    r, w, k, v, low, state = leaves
    a0, k_k, k_a, r_k = (x.to(dtype) for x in made.parameters.values())
    rate, n = torch.sigmoid(a0 + low), torch.nn.functional.normalize(k * k_k, dim=-1)
    key = k * (1 + (rate - 1) * k_a)
    loop = reference.wkv7 if dtype == torch.float64 else _loop
    y, final = loop(r, w, key, v, -n, n * rate, state, case.cu_seqlens)
    bonus = (r * key * r_k).sum(-1)
    loss = (y * case.gy.to(dtype)).sum()
    for x, gradient in ((final, case.gfinal), (bonus, made.gbonus)):
        loss = loss if gradient is None else loss + (x * gradient.to(dtype)).sum()
    gradients = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return [x.detach() for x in (y, final, bonus, *gradients)]


def truth(case):
    """The results in float64, by autograd through the reference."""
    return wkv6_cases.differentiate(case, torch.float64, reference.wkv7)


def plain(case):
    """The results of a plain torch loop that does everything in the case's dtype."""
    return wkv6_cases.differentiate(case, case.r.dtype, reference.wkv7 if case.r.dtype == torch.float32 else _loop)


def _loop(r, w, k, v, a, b, state, cu_seqlens):
    B, T, H, N = r.shape
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    decay = torch.exp(reference.DECAY_SCALE * torch.sigmoid(w))
    ys, finals = [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        S = r.new_zeros(B, H, N, N) if state is None else state if cu_seqlens is None else state[n : n + 1]
        for t in range(start, end):
            removed = S @ a[:, t, :, :, None]  # (B, H, N, 1)
            S = S * decay[:, t, :, None] + removed * b[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
            ys.append((S @ r[:, t, :, :, None]).squeeze(-1))
        finals.append(S)
    return torch.stack(ys, dim=1), torch.cat(finals)
