"""The wkv7 recurrence in plain torch, one step at a time: the definition that every other backend is tested against."""

import math

import torch
from torch import Tensor

from ..recurrence.signature import Signature, one_by_one

SIGNATURE = Signature("wkv7", rows=("r", "w", "k", "v", "a", "b"), shared=(), state_rows="value")

# A decay's logarithm is -e^(-1/2) sigmoid(w), so that no step keeps less than 0.545 of the state.
DECAY_SCALE = -math.exp(-0.5)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's recurrence ("Goose", Peng et al. 2025, arXiv 2503.14456), differentiable any number of times.

    With S a head's state, rows the value dimension, columns the key dimension:
        S_t = S_{t-1} diag(exp(-e^(-1/2) sigmoid(w_t))) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ
        y_t = S_t r_t

    r w k v a b (B, T, H, N), state (B, H, N, N) or None for zeros -> y (B, T, H, N) in v's dtype, final state
    (B, H, N, N). With cu_seqlens (n + 1,), B is 1, the row holds n sequences and the states are (n, H, N, N).
    Computes in float64 if v is float64, else in float32.
    """
    if cu_seqlens is not None:
        return one_by_one(wkv7, (r, w, k, v, a, b), (), state, cu_seqlens)

    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    B, T, H, N = v.shape
    out_dtype = v.dtype
    r, w, k, v, a, b = (x.to(dtype) for x in (r, w, k, v, a, b))
    decay = torch.exp(DECAY_SCALE * torch.sigmoid(w))
    S = v.new_zeros(B, H, N, N) if state is None else state.to(dtype)
    ys = []
    for t in range(T):
        removed = S @ a[:, t, :, :, None]  # (B, H, N, 1)
        S = S * decay[:, t, :, None, :] + removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        ys.append((S @ r[:, t, :, :, None]).squeeze(-1))  # (B, H, N)
    return torch.stack(ys, dim=1).to(out_dtype), S
