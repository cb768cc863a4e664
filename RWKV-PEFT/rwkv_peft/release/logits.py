"""Compute the logits of our own model over one token sequence, and how far apart two sets of logits are."""

from typing import NamedTuple

import torch

from ..files.base import Base
from ..models.state import State, split_time_states, state_of


def random_tokens(vocab_size: int, length: int) -> torch.Tensor:
    """Draw (length,) int64 tokens, the same on every run."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def reference_logits(base: Base, tokens: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Compute the logits (T, V) of a Base over tokens (T,) int64, in float64 unless dtype says otherwise. The sequence
    starts from the base's time states, if it has any."""
    family, (weights, states) = base.family, split_time_states(base.tensors)
    model = family.load({key: tensor.to(dtype) for key, tensor in weights.items()}, base.config)
    start = State.zeros(base.config, 1, dtype=dtype)
    if states:
        start = state_of(states, start, family.rows_are_keys, base.path)
    with torch.inference_mode():
        return model(tokens[None], start)[0][0]


class Difference(NamedTuple):
    """The difference of two sets of logits (T, V): norm of the difference over the reference's norm, and the share of
    positions with the same top token."""

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
