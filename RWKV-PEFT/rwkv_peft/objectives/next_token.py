"""The objective of pre-training and of answers: predict each token that counts from those before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..config.objective import Batch, Head, Losses, Objective, Passes, number_of_tokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NextToken(Objective):
    """The mean cross-entropy of the tokens that count, by their weights if they have any."""

    name = "next_token"
    text = "the likelihood of each token that counts"
    rows = ("binidx", "sft")
    of_tokens = True

    def head(
        self,
        targets: "Tensor",
        counted: "Tensor",
        count: float,
        weights: "Tensor | None" = None,
        parts: "Tensor | None" = None,
    ) -> Head:
        """The loss of positions that count, as a function for a model's head; arguments as in linear_cross_entropy."""
        from .cross_entropy import linear_cross_entropy

        return partial(
            linear_cross_entropy, targets=targets, counted=counted, count=count, weights=weights, parts=parts
        )

    def loss(self, passes: Passes, batch: Batch, count: float) -> Losses:
        """Its figures are the losses of several data files, "loss/NAME", of those that count in the step."""
        shares: Mapping[str, float] = cast(Any, batch).get("sources") or {}
        of = (batch["targets"], batch["counted"], count, batch.get("weights"))
        if not shares:
            return passes.model(self.head(*of)), {}
        loss, *parts = passes.model(self.head(*of, batch["of_source"]))
        named = zip(shares.items(), parts)
        return loss, {f"loss/{name}": part.detach() / share for (name, share), part in named if share}

    def items(self, batch: Batch) -> "Tensor":
        return number_of_tokens(batch)
