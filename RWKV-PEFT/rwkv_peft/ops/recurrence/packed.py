"""Packed sequences in plain torch, for the references."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def one_by_one(
    recurrence: Callable[..., tuple[Tensor, Tensor]],
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """y (1, T, H, N) and the final states of recurrence(*rows, *shared, state), run over one sequence after another.

    rows: tensors (1, T, H, N) of n sequences with the bounds cu_seqlens (n + 1,); state (n, H, N, N) or None.
    """
    bounds = cu_seqlens.tolist()
    ys, finals = [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        parts, initial = [x[:, start:end] for x in rows], None if state is None else state[n : n + 1]
        y, final = recurrence(*parts, *shared, initial)
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, dim=1), torch.cat(finals)
