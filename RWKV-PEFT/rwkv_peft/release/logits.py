"""Logits of our own model over one token sequence, to compare others with, and how far apart two sets of logits are."""

from typing import NamedTuple

import torch

from ..files.base import Base
from ..models.state import State, split_time_states, state_of


def random_tokens(vocab_size: int, length: int) -> torch.Tensor:
    """(length,) int64, the same on every run."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def reference_logits(base: Base, tokens: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits (T, V) of a Base, in float64 unless dtype says otherwise, from its time states where it has some; tokens
    (T,) int64."""
    family, (weights, states) = base.family, split_time_states(base.tensors)
    model = family.load({key: tensor.to(dtype) for key, tensor in weights.items()}, base.config)
    start = State.zeros(base.config, 1, dtype=dtype)
    if states:
        start = state_of(states, start, family.rows_are_keys, base.path)
    with torch.inference_mode():
        return model(tokens[None], start)[0][0]


class Difference(NamedTuple):
    """How far logits (T, V) are from others: norm of the difference over norm, and the share of equal top tokens."""

    relative: float
    top_agreement: float

    @classmethod
    def between(cls, logits: torch.Tensor, reference: torch.Tensor) -> "Difference":
        return cls(
            float((logits - reference).norm() / reference.norm()),
            float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        )

    def __str__(self) -> str:
        return f"relative difference {self.relative:.1e}, same top token in {self.top_agreement:.0%}"
