"""Preference training by DPO: make the better of two answers to a prompt likelier than the worse.

Rafailov et al. 2023, arXiv 2305.18290, equation 7: with p an answer's log-probability, and `before` that before
training, margin = beta (p_chosen - before_chosen - p_rejected + before_rejected), and the loss is -log sigmoid(margin).
A pass of its own computes `before`, with the adapters as they were before training.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...adapters.layer import untrained
from .loss import token_losses
from .steps import Batch, Step, Way, straight


class Preferences(Step):
    """The DPO step over packed rows of pairs, the better answer first. `way` goes through the model, `base_way` through
    the model as it was before training. nll is the weight of the mean loss of the better answer's tokens, which is
    added (Pang et al. 2024, arXiv 2404.19733).

    measures: accuracy, the share of pairs whose margin is above 0; margin, the mean of the margins; chosen, the better
    answers' part of it, beta (p_chosen - before_chosen), below 0 if they become less likely themselves.
    """

    def __init__(self, beta: float, nll: float = 0.0, way: Way = straight, base_way: Way = straight) -> None:
        self.beta, self.nll, self.way, self.base_way = beta, nll, way, base_way

    def loss(self, model: nn.Module, batch: Batch, count: float) -> torch.Tensor:
        with torch.no_grad(), untrained(model):
            before = losses_of_documents(model, batch, self.base_way)
        now = losses_of_documents(model, batch, self.way)
        tokens = counted_tokens(batch)
        counts = tokens.any(1)  # pairs that only fill up a batch do not count
        chosen, rejected = (before - now).view(-1, 2).unbind(1)
        margin = self.beta * (chosen - rejected)
        losses = F.softplus(-margin) + self.nll * now[::2] / tokens[:, 0].clamp_min(1)
        self.measures = {
            "accuracy": ((margin > 0) & counts).sum() / count,
            "margin": (margin.detach() * counts).sum() / count,
            "chosen": (self.beta * chosen.detach() * counts).sum() / count,
        }
        return (losses * counts).sum() / count

    def items(self, batch: Batch) -> torch.Tensor:
        return counted_tokens(batch).any(1).sum()


def losses_of_documents(model: nn.Module, batch: Batch, way: Way = straight) -> torch.Tensor:
    """The negative log-probability of the counted tokens of each document in a packed batch: (documents,)."""
    head = partial(token_losses, targets=batch["targets"], counted=batch["counted"])
    return per_document(batch, way(model, batch, head))


def counted_tokens(batch: Batch) -> torch.Tensor:
    """The number of counted tokens in the two answers of each pair: (pairs, 2)."""
    return per_document(batch, torch.ones_like(batch["counted"])).view(-1, 2)


def per_document(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """Sum values of the counted positions (n,) by document -> (documents,)."""
    bounds = batch["cu_seqlens"]
    documents = torch.searchsorted(bounds[1:].contiguous(), batch["counted"], right=True)
    owned = documents == torch.arange(len(bounds) - 1, device=documents.device)[:, None]  # (documents, n)
    return (owned * values).sum(1)  # in the same order on every run, unlike index_add on a GPU
