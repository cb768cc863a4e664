"""What RWKV-6 does between its matrix products: token shift with interpolation, gates, the normalization of heads.

Each operation is written out in plain torch, which takes any device and dtype, is differentiable twice and is what
torch.compile sees. On the CPU, float32 and bfloat16 tensors go through one C++ pass forward and one backward instead
(cpu.py), where a compiler exists; those are differentiable once.
"""

import torch
import torch.nn.functional as F

from ..native.arguments import takes
from . import cpu


def token_shift(x, last=None, cu_seqlens=None):
    """Each token's predecessor.

    x (B, T, C); last (B, C) or None precedes the first token. With cu_seqlens (n + 1,), B is 1, the row holds n
    sequences, and last is (n, C). Returns (B, T, C).
    """
    first = x.new_zeros(x.shape[0], 1, x.shape[2])
    if last is not None and cu_seqlens is None:
        first = last[:, None]
    previous = torch.cat([first, x[:, :-1]], dim=1)
    if cu_seqlens is None:
        return previous
    starts = cu_seqlens[:-1].long()
    if last is None:
        return previous.index_fill(1, starts, 0)
    return previous.index_copy(1, starts, last[None])


def lerp(x, last, maa, low=None, up=None, cu_seqlens=None):
    """Points between each token and its predecessor p: x + (p - x) m_i, where m_i = maa_i + low_i up_i, for each i.

    x (B, T, C), last and cu_seqlens as in token_shift; maa (m, C); low (B, T, m K), i after i, and up (m, K, C) make
    the weights depend on the token, both None: they do not -> m tensors (B, T, C).
    """
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if last is not None and last.shape != (sequences, x.shape[2]):
        raise ValueError(
            f"the state's shift is {tuple(last.shape)}; it must be one vector of the model's width for each "
            f"of the {sequences} sequences: {(sequences, x.shape[2])}"
        )
    if (low is None) != (up is None) or up is not None and low.shape[-1] != up.shape[0] * up.shape[1]:
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (low, up)]
        raise ValueError(f"low and up must be (B, T, m K) and (m, K, C), or both None, not {shapes[0]} and {shapes[1]}")
    if takes(x, last, maa, low, up) and cpu.available():
        bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        return cpu.run(cpu.Lerp, *_contiguous(x, last, maa, low, up), bounds)
    delta = token_shift(x, last, cu_seqlens) - x
    weights = maa if low is None else maa[:, None, None] + _offsets(low, up)
    return tuple(torch.addcmul(x, delta, weight) for weight in weights)


def _offsets(low, up):
    """low_i up_i: (B, T, m K), (m, K, C) -> (m, B, T, C)."""
    B, T, _ = low.shape
    m, K, C = up.shape
    return torch.bmm(low.reshape(B * T, m, K).transpose(0, 1), up).view(m, B, T, C)


def norm_gate(y, g, weight, bias, eps):
    """Normalizes each head and gates it: (normalized y · weight + bias) · silu(g).

    y (B, T, H, N), g (B, T, H N), weight and bias (H N,) -> (B, T, H N).
    """
    if takes(y, g, weight, bias) and cpu.available():
        return cpu.run(cpu.NormGate, *_contiguous(y, g, weight, bias), eps)
    B, T, H, N = y.shape
    return F.group_norm(y.reshape(B * T, H * N), H, weight, bias, eps).view(B, T, H * N) * F.silu(g)


def sigmoid_gate(r, v):
    """sigmoid(r) · v, for r and v of one shape."""
    if takes(r, v) and cpu.available():
        return cpu.run(cpu.SigmoidGate, *_contiguous(r, v))
    return torch.sigmoid(r) * v


def relu_square(x):
    """max(x, 0)²."""
    if takes(x) and cpu.available():
        return cpu.run(cpu.ReluSquare, *_contiguous(x))
    return torch.relu(x).square()


def _contiguous(*tensors):
    return (None if x is None else x.contiguous() for x in tensors)
