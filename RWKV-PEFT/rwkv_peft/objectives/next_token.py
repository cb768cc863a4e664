"""The objective of pre-training and of answers: predict each token that counts from those before it."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..config.objective import Objective, Passes, number_of_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ..config.objective import Batch, Figures, Head


@dataclass(frozen=True)
class NextToken(Objective):
    """The mean cross-entropy of the tokens that count, by their weights if they have any."""

    name = "next_token"
    text = "the likelihood of each token that counts"
    rows = ("binidx", "sft")
    of_tokens = True

    def head(self, targets: "Tensor", counted: "Tensor", count: float, weights: "Tensor | None" = None) -> "Head":
        """The loss of positions that count, as a function that a model's head takes; arguments as in
        linear_cross_entropy."""
        from .cross_entropy import linear_cross_entropy

        return partial(linear_cross_entropy, targets=targets, counted=counted, count=count, weights=weights)

    def loss(self, passes: Passes, batch: "Batch", count: float) -> "tuple[Tensor, Figures]":
        return passes.model(self.head(batch["targets"], batch["counted"], count, batch.get("weights"))), {}

    def items(self, batch: "Batch") -> "Tensor":
        return number_of_tokens(batch)
