"""The wkv6 recurrence in plain torch, one step at a time: the definition that every other backend is tested against."""

import torch
from torch import Tensor

from ..recurrence.signature import Signature, one_by_one

SIGNATURE = Signature("wkv6", rows=("r", "k", "v", "w"), shared=("u",), state_rows="key")


LARGEST_W = 80.0  # w is cut here: the decay is 0 long before, and exp(w) and its gradient stay finite


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RWKV-6's recurrence (Peng et al. 2024, arXiv 2404.05892, eq. 19), differentiable any number of times.

    With S a head's state, rows the key dimension, columns the value dimension:
        y_t = r_tᵀ (S_{t-1} + diag(u) k_t v_tᵀ)
        S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_tᵀ

    r k v w (B, T, H, N), u (H, N), state (B, H, N, N) or None for zeros -> y (B, T, H, N) in v's dtype, final state
    (B, H, N, N). With cu_seqlens (n + 1,), B is 1, the row holds n sequences and the states are (n, H, N, N).
    Computes in float64 if v is float64, else in float32.
    """
    if cu_seqlens is not None:
        return one_by_one(wkv6, (r, k, v, w), (u,), state, cu_seqlens)

    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    B, T, H, N = v.shape
    out_dtype = v.dtype
    r, k, v, w, u = (x.to(dtype) for x in (r, k, v, w, u))
    decay = torch.exp(-torch.exp(w.clamp(max=LARGEST_W)))
    S = v.new_zeros(B, H, N, N) if state is None else state.to(dtype)
    ys = []
    for t in range(T):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]  # (B, H, N, N)
        ys.append((r[:, t, :, None, :] @ (S + u[:, :, None] * kv)).squeeze(-2))  # (B, H, N)
        S = decay[:, t, :, :, None] * S + kv
    return torch.stack(ys, dim=1).to(out_dtype), S
