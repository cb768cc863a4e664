"""Log-probabilities of a packed batch's documents: the two answers of a row, or answers drawn to prompts."""

from functools import partial

import torch

from ..config.objective import Batch, Pass
from .cross_entropy import token_losses
from .divergence import linear_entropy


def log_probabilities(through: Pass, batch: Batch) -> torch.Tensor:
    """The log-probability of the counted tokens of each document: (rows, 2)."""
    return -per_document(batch, counted_losses(through, batch)).view(-1, 2)


def counted_losses(through: Pass, batch: Batch) -> torch.Tensor:
    """The loss of each counted token (n,)."""
    return through(partial(token_losses, targets=batch["targets"], counted=batch["counted"]))


def counted_tokens(batch: Batch) -> torch.Tensor:
    """The number of counted tokens in each document: (rows, 2)."""
    return per_document(batch, torch.ones_like(batch["counted"])).view(-1, 2)


def per_document(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """Sum values of the counted positions (n,) by document -> (documents,)."""
    bounds = batch["cu_seqlens"]
    documents = torch.searchsorted(bounds[1:].contiguous(), batch["counted"], right=True)
    owned = documents == torch.arange(len(bounds) - 1, device=documents.device)[:, None]  # (documents, n)
    return (owned * values).sum(1)  # in the same order on every run, unlike index_add on a GPU


def drawn_log_probabilities(
    through: Pass, batch: Batch, temperature: float, shares: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each drawn token (n,), answer by answer, at a temperature; before it, from the same pass,
    the sum () of the entropies at these tokens, each times its answer's share (answers,), 0 without shares."""

    def head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        warm = x if temperature == 1 else x / temperature
        losses = token_losses(warm, weight, batch["targets"], batch["counted"])
        if shares is None:
            return losses
        weights = shares.repeat_interleave(batch["lengths"], output_size=len(losses))
        return torch.cat([-linear_entropy(warm, weight, batch["counted"], weights)[None], losses])

    found: torch.Tensor = -through(head)
    return (found.new_zeros(()), found) if shares is None else (found[0], found[1:])


def means(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Means of values (n,) over answers of these lengths, in one order on every run, unlike a GPU's index_add."""
    return torch.segment_reduce(values, "mean", lengths=lengths, unsafe=True)
