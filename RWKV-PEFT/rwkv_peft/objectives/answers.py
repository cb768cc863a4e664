"""The base class of objectives on log-probabilities of whole answers."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..config.objective import Batch, Figure, Losses, Objective, Passes

if TYPE_CHECKING:
    from torch import Tensor

ACCURACY = Figure("accuracy", "preferred as the rows say", "share")
MARGIN = Figure("margin", "margin", "margin (nats)")
CHOSEN, NLL = Figure("chosen"), Figure("nll")


class Answers(NamedTuple):
    """The answers of a batch, two a row, in the order of its documents.

    likelihood (rows, 2): log-probabilities; base: the reference log-probabilities, 0 unless the objective needs them;
    tokens (rows, 2): the number of counted tokens; labels (rows,): true if the first answer is desirable, if rows are
    labelled; figures: the previous step's, over all ranks.
    """

    likelihood: "Tensor"
    base: "Tensor"
    tokens: "Tensor"
    labels: "Tensor | None"
    figures: Mapping[str, float]

    @property
    def counts(self) -> "Tensor":
        """True for each row that counts (rows,): rows that only fill up a batch do not."""
        return self.tokens.any(1)

    @property
    def gains(self) -> "tuple[Tensor, Tensor]":
        """Log-ratios (rows,) of the first and of the second answer: how much likelier each became in training."""
        first, second = (self.likelihood - self.base).unbind(1)
        return first, second

    @property
    def lengths(self) -> "Tensor":
        """Tokens to divide by (rows, 2): at least 1."""
        return self.tokens.clamp_min(1)


@dataclass(frozen=True)
class OfAnswers(Objective):
    """The mean over rows of a loss of each row's two answers."""

    rows = ("pairs",)
    unit = "pair"
    pace = 0.03
    excludes = (
        ("--peft lora-ga", "it begins with the gradient of another loss", "take another method"),
        ("--train_type infctx", "an answer's probability is that of all its tokens at once", "leave it out"),
        ("--context_parallel", "an answer's probability is that of all its tokens at once", "leave it out"),
        ("--dataload !pack", "answers are packed", "leave it out"),
        ("--loss_mask !file", "answers alone count", "leave it out"),
    )

    @abstractmethod
    def losses(self, answers: Answers) -> Losses:
        """The loss of each row (rows,), and figures of each by name."""

    def loss(self, passes: Passes, batch: Batch, count: float) -> Losses:
        from .documents import counted_tokens, log_probabilities

        base = log_probabilities(passes.base, batch) if self.asks_base else None
        likelihood = log_probabilities(passes.model, batch)
        base = likelihood.new_zeros(()) if base is None else base
        labels = batch["labels"][::2] if "labels" in batch else None  # of a row's own answer, which is the first
        answers = Answers(likelihood, base, counted_tokens(batch), labels, passes.figures)
        losses, figures = self.losses(answers)
        means = {name: (figure.detach() * answers.counts).sum() / count for name, figure in figures.items()}
        return (losses * answers.counts).sum() / count, means

    def items(self, batch: Batch) -> "Tensor":
        from .documents import counted_tokens

        return counted_tokens(batch).any(1).sum()
