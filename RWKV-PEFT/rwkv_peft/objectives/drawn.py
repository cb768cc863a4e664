"""Log-probabilities of the answers that were drawn to a batch's prompts, and means over the tokens of each."""

from typing import TYPE_CHECKING

import torch

from .cross_entropy import token_losses

if TYPE_CHECKING:
    from ..config.objective import Batch, Pass


def log_probabilities(through: "Pass", batch: "Batch", temperature: float) -> torch.Tensor:
    """The log-probability of each drawn token (n,), answer by answer, at a temperature."""

    def head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return token_losses(x if temperature == 1 else x / temperature, weight, batch["targets"], batch["counted"])

    return -through(head)


def means(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean of values (n,) over each answer, whose lengths (answers,) add up to n; in the same order on every run,
    unlike index_add on a GPU."""
    found: torch.Tensor = torch.segment_reduce(values, "mean", lengths=lengths, unsafe=True)
    return found
