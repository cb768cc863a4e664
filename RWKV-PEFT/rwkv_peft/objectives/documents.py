"""Log-probabilities of the documents of a packed batch, two of which are a row's answers with their prompts."""

from functools import partial
from typing import TYPE_CHECKING

import torch

from .cross_entropy import token_losses

if TYPE_CHECKING:
    from ..config.objective import Batch, Pass


def log_probabilities(through: "Pass", batch: "Batch") -> torch.Tensor:
    """The log-probability of the counted tokens of each document: (rows, 2)."""
    return -per_document(batch, counted_losses(through, batch)).view(-1, 2)


def counted_losses(through: "Pass", batch: "Batch") -> torch.Tensor:
    """The loss of each counted token (n,)."""
    return through(partial(token_losses, targets=batch["targets"], counted=batch["counted"]))


def counted_tokens(batch: "Batch") -> torch.Tensor:
    """The number of counted tokens in each document: (rows, 2)."""
    return per_document(batch, torch.ones_like(batch["counted"])).view(-1, 2)


def per_document(batch: "Batch", values: torch.Tensor) -> torch.Tensor:
    """Sum values of the counted positions (n,) by document -> (documents,)."""
    bounds = batch["cu_seqlens"]
    documents = torch.searchsorted(bounds[1:].contiguous(), batch["counted"], right=True)
    owned = documents == torch.arange(len(bounds) - 1, device=documents.device)[:, None]  # (documents, n)
    return (owned * values).sum(1)  # in the same order on every run, unlike index_add on a GPU
