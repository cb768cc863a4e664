"""Token shift in plain torch: each token's predecessor, and the weights' low-rank product."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def fit(low: Tensor | None, up: Tensor | None) -> bool:
    """True if (B, T, m K) and (m, K, C) go together, or are both None."""
    if low is None or up is None:
        return low is up
    return low.shape[-1] == up.shape[0] * up.shape[1]


def offsets_of(low: Tensor, up: Tensor) -> Tensor:
    """low_i up_i: (B, T, m K), (m, K, C) -> (m, B, T, C)."""
    B, T, _ = low.shape
    m, K, C = up.shape
    return torch.bmm(low.reshape(B * T, m, K).transpose(0, 1), up).view(m, B, T, C)
