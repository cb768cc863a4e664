"""The models' operations between their matrix products: token shift with interpolation, gates, keys, the normalization
of heads.

Each operation is written out in plain torch, which takes any device and dtype and is differentiable twice. If the
kernels can be built, bfloat16 tensors, and float32 ones on CPUs, take one pass forward and one backward instead
(functions.py), differentiable once, in graphs of torch.compile too.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, cuda, functions
from .functions import KERNELS, run


def token_shift(x: Tensor, last: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Each token's predecessor.

    x (B, T, C); last (B, C) or None precedes the first token. With cu_seqlens (n + 1,), B is 1, the row holds n
    sequences (those at the end may be empty), and last is (n, C). Returns (B, T, C).
    """
    if cu_seqlens is None:
        first = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last[:, None]
        return torch.cat([first, x[:, :-1]], dim=1)
    # (1, T + 1, C): empty sequences begin at the last. Not torch.cat: torch.compile (2.13) lets its result share x's
    # memory, so that the zeros below would be written into x itself.
    previous = F.pad(x, (0, 0, 1, 0))
    starts = cu_seqlens[:-1].long()
    if last is None:
        return previous.index_fill(1, starts, 0)[:, :-1]
    return previous.index_copy(1, starts, last[None])[:, :-1]


def check_shift(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError unless last is None, or one token for each sequence of x, as in token_shift."""
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if last is not None and last.shape != (sequences, x.shape[2]):
        raise ValueError(
            f"the state's shift is {tuple(last.shape)}; it must be one vector of the model's width for each "
            f"of the {sequences} sequences: {(sequences, x.shape[2])}"
        )


def last_token(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The last token of each sequence of x (B, T, C) -> (B, C), or (n, C) if cu_seqlens packs n sequences. The row of
    an empty sequence means nothing, here and in the kernels that give the last tokens."""
    if cu_seqlens is not None:
        return x[0, cu_seqlens[1:].long() - 1]
    # A view would keep all of x alive as long as the state, though checkpointed blocks keep nothing else of x.
    return x[:, -1] if x.shape[1] == 1 else x[:, -1].clone()


def shapes_match(low: Tensor | None, up: Tensor | None) -> bool:
    """True if (B, T, m K) and (m, K, C) go together, or are both None."""
    if low is None or up is None:
        return low is up
    return low.shape[-1] == up.shape[0] * up.shape[1]


def has_kernel(first: Tensor, *others: Tensor | None) -> bool:
    """True if tensors (None: not given) go through a kernel: the one place that decides."""
    return cpu.FAMILY.takes(first, *others) if first.is_cpu else cuda.takes(first, *others)


def lerp(
    x: Tensor,
    last: Tensor | None,
    maa: Tensor,
    low: Tensor | None = None,
    up: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Points between each token and its predecessor p: x + (p - x) m_i, with m_i = maa_i + low_i up_i, for each i.

    x (B, T, C), last and cu_seqlens as in token_shift; maa (m, C); low (B, T, m K), point by point, and up (m, K, C)
    make the weights depend on the token; without them (None) they do not -> m tensors (B, T, C).
    """
    check_shift(x, last, cu_seqlens)
    if not shapes_match(low, up):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (low, up)]
        raise ValueError(f"low and up must be (B, T, m K) and (m, K, C), or both None, not {shapes[0]} and {shapes[1]}")
    if has_kernel(x, last, maa, low, up):
        kernel = functions.CpuLerp if x.is_cpu else functions.GpuLerp
        bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        return run(kernel, *_contiguous(x, last, maa, low, up), bounds)
    delta = token_shift(x, last, cu_seqlens) - x
    added = functions.offsets(low, up)  # (m, B T, C)
    weights = maa if added is None else maa[:, None, None] + added.view(-1, *x.shape)
    return tuple(torch.addcmul(x, delta, weight) for weight in weights)


def norm_gate(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalizes each head and gates it: (normalized y · weight + bias) · silu(g).

    y (B, T, H, N), g (B, T, H N), weight and bias (H N,) -> (B, T, H N).
    """
    if has_kernel(y, g, weight, bias):
        return _by_kernel("norm_gate", y, g, weight, bias, eps=eps)
    B, T, H, N = y.shape
    return F.group_norm(y.reshape(B * T, H * N), H, weight, bias, eps).view(B, T, H * N) * F.silu(g)


def sigmoid_gate(r: Tensor, v: Tensor) -> Tensor:
    """sigmoid(r) · v, for r and v of one shape."""
    if has_kernel(r, v):
        return _by_kernel("sigmoid_gate", r, v)
    return torch.sigmoid(r) * v


def relu_square(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    if has_kernel(x):
        return _by_kernel("relu_square", x)
    return torch.relu(x).square()


def delta_keys(k: Tensor, low: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of RWKV-7's delta rule (Peng et al. 2025, arXiv 2503.14456, section 4), given a key k and an in-context
    learning rate, sigmoid(a0 + low): the key to write at, the key to remove, and the latter times the rate.

    k, low (B, T, H, N); a0, k_k, k_a (1, 1, H N) -> key, a, b (B, T, H, N): k · (1 + (rate - 1) k_a), -n and n · rate,
    n being k · k_k divided by its length in each head (or by 1e-12 if it is shorter).
    """
    if has_kernel(k, low, a0, k_k, k_a):
        return _by_kernel("delta_keys", k, low, a0, k_k, k_a)
    a0, k_k, k_a = (x.view(k.shape[2:]) for x in (a0, k_k, k_a))
    rate = torch.sigmoid(a0 + low)
    n = F.normalize(k * k_k, dim=-1)
    return k * (1 + (rate - 1) * k_a), -n, n * rate


def value_residual(v: Tensor, first: Tensor, low: Tensor, v0: Tensor) -> Tensor:
    """RWKV-7's values: v + (first - v) · sigmoid(v0 + low), first being layer 0's.

    v, first, low (B, T, C); v0 (1, 1, C) -> (B, T, C).
    """
    if has_kernel(v, first, low, v0):
        return _by_kernel("value_residual", v, first, low, v0)
    return v + (first - v) * torch.sigmoid(v0 + low)


def norm_bonus_gate(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, parameters: tuple[Tensor, Tensor, Tensor], eps: float
) -> Tensor:
    """Normalizes each head, adds the current token's bonus and gates it: (normalized y · weight + bias + s v) · g,
    s being the sum of r · k · r_k over the head.

    y, r, k, v (B, T, H, N), g (B, T, H N); parameters: r_k (H, N), weight and bias (H N,) -> (B, T, H N).
    """
    if has_kernel(y, r, k, v, g, *parameters):
        return _by_kernel("norm_bonus_gate", y, r, k, v, g, *parameters, eps=eps)
    B, T, H, N = y.shape
    r_k, weight, bias = parameters
    normal = F.group_norm(y.reshape(B * T, H * N), H, weight, bias, eps).view(y.shape)
    return (normal + (r * k * r_k).sum(-1, keepdim=True) * v).view(g.shape) * g


def _by_kernel(name: str, *tensors: Tensor, eps: float | None = None) -> Any:
    return run(KERNELS[name], eps, *_contiguous(*tensors))


def _contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if x is None else x.contiguous() for x in tensors)
