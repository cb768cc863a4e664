"""Inputs of the recurrences' kernels, the true results in float64, those of plain torch in low precision, and those of
the CUDA kernels."""

import dataclasses
from dataclasses import dataclass, make_dataclass, replace
from unittest.mock import patch

import torch

from rwkv_peft.ops.wkv6 import WKV6
from rwkv_peft.ops.wkv7 import WKV7
from rwkv_peft.ops.wkv7.reference import DECAY_SCALE


@dataclass(frozen=True)
class Case:
    """Inputs by name: rows and gy (B, T, H, N) in one dtype, u (H, N), state and gfinal (n, H, N, N) float32 or
    None."""

    state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    gy: torch.Tensor
    gfinal: torch.Tensor | None

    @property
    def inputs(self):
        return tuple(getattr(self, name) for name in self.names)

    def mapped(self, function):
        """The case with function(tensor) in place of each tensor."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return replace(self, **{name: None if x is None else function(x) for name, x in tensors.items()})


def case_class(recurrence):
    """Case with the fields of a recurrence's inputs."""
    names = recurrence.signature.inputs
    fields = [(name, torch.Tensor, dataclasses.field(kw_only=True)) for name in names]
    return make_dataclass("Case", fields, bases=(Case,), frozen=True, namespace={"names": names})


class Cases:
    """Random cases of a recurrence, and their results in the order of `results`: y, final state, gradients."""

    def __init__(self, recurrence, draw, loop, decays):
        """draw(shape, decay, generator) -> the inputs by name; loop: the reference in its inputs' dtype."""
        self.recurrence, self.cuda, self.draw, self.loop, self.decays = recurrence, recurrence.cuda, draw, loop, decays
        self.results = ("y", "final state", *recurrence.signature.gradients, "gstate")
        self.Case = case_class(recurrence)

    def make(self, shape, dtype, *, decay=None, with_state=True, lengths=None, seed=0, **kinds):
        """A random case of a shape (B, T, H, N). `lengths`, whose sum is T, packs that many sequences into one row."""
        B, T, H, N = shape
        g = torch.Generator().manual_seed(seed)
        gy = 0.5 * torch.randn(B, T, H, N, generator=g)
        n = B if lengths is None else len(lengths)
        bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
        state, gfinal = (s * torch.randn(n, H, N, N, generator=g) if with_state else None for s in (0.3, 0.1))
        inputs = self.draw(shape, self.decays[0] if decay is None else decay, g, **kinds)
        inputs = {name: x if name == "u" else x.to(dtype).contiguous() for name, x in inputs.items()}
        return self.Case(state, bounds, gy.to(dtype), gfinal, **inputs)

    def run(self, kernels, case, group=0):
        """The CUDA kernels' results, without gstate if there is no state. group: the tokens of a group if time is
        split."""
        given = (*case.inputs, case.state, case.cu_seqlens)
        with patch.object(self.cuda.family, "kernels", lambda device: kernels):
            y, final, checkpoints = self.cuda.forward(*given, save=True, group=group)
            gradients = self.cuda.backward(*given, checkpoints, case.gy, case.gfinal, group=group)
        return (y, final, *gradients)[: None if case.state is not None else -1]

    def truth(self, case):
        """The results in float64, by autograd through the reference."""
        return differentiate(case, torch.float64, self.recurrence.reference)

    def plain(self, case):
        """The results of a plain torch loop that does everything in the case's dtype."""
        return differentiate(case, case.gy.dtype, self.loop)


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


def draw6(shape, decay, g):
    """decay of the raw w: "ordinary", "none" (exp(-exp(w)) rounds to 1), "all" (it underflows), or a "mix" of all."""
    r, k, v = (0.5 * torch.randn(shape, generator=g) for _ in range(3))
    ordinary = torch.rand(shape, generator=g) * 7 - 6
    none, everything = torch.full(shape, -20.0), torch.rand(shape, generator=g) * 90 + 5
    strong, choice = torch.rand(shape, generator=g) * 5, torch.randint(4, shape, generator=g)
    mix = torch.stack([ordinary, none, everything, strong]).gather(0, choice[None])[0]
    w = {"ordinary": ordinary, "none": none, "all": everything, "mix": mix}[decay]
    return dict(r=r, k=k, v=v, w=w, u=0.5 * torch.randn(shape[2:], generator=g))


def draw7(shape, decay, g, repeated=False):
    """a and b as the model makes them: a direction to remove, and the same times a learning rate. decay: bounds of w.
    repeated: all tokens share one direction and a learning rate of 1, so that each removes what the one before has
    written."""
    low, high = DECAYS7[decay]
    r, k, v, direction = (0.5 * torch.randn(shape, generator=g) for _ in range(4))
    direction = torch.nn.functional.normalize(direction[:, :1].expand(shape) if repeated else direction, dim=-1)
    rate = torch.ones(shape) if repeated else torch.rand(shape, generator=g)
    w = low + (high - low) * torch.rand(shape, generator=g)
    return dict(r=r, w=w, k=direction if repeated else k, v=v, a=-direction, b=direction * rate)


def looped(step, r, state, cu_seqlens):
    """y and the final states of (t, state) -> (y of a token, state), a sequence after the other."""
    B, T, H, N = r.shape
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    ys, finals = [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        S = r.new_zeros(B, H, N, N) if state is None else state if cu_seqlens is None else state[n : n + 1]
        for t in range(start, end):
            y, S = step(t, S)
            ys.append(y)
        finals.append(S)
    return torch.stack(ys, dim=1), torch.cat(finals)


def loop6(r, k, v, w, u, state, cu_seqlens):
    decay = torch.exp(-torch.exp(w))

    def step(t, S):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        return (r[:, t, :, :, None] * (S + u[:, :, None] * kv)).sum(-2), decay[:, t, :, :, None] * S + kv

    return looped(step, r, state, cu_seqlens)


def loop7(r, w, k, v, a, b, state, cu_seqlens):
    decay = torch.exp(DECAY_SCALE * torch.sigmoid(w))

    def step(t, S):
        removed = S @ a[:, t, :, :, None]  # (B, H, N, 1)
        S = S * decay[:, t, :, None] + removed * b[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
        return (S @ r[:, t, :, :, None]).squeeze(-1), S

    return looped(step, r, state, cu_seqlens)


DECAYS7 = {"usual": (-6.0, 2.0), "none": (-40.0, -20.0), "strong": (6.0, 95.0), "mixed": (-8.0, 8.0)}
CASES = {
    "wkv6": Cases(WKV6, draw6, loop6, ("ordinary", "none", "all", "mix")),
    "wkv7": Cases(WKV7, draw7, loop7, tuple(DECAYS7)),
}


def rms(x):
    return x.double().square().mean().sqrt().item()


def error(x, true):
    """Root mean square of x - true."""
    return rms(x.double() - true)
