"""KTO: make desirable answers likelier and undesirable ones less likely, one labelled answer to a prompt.

Ethayarajh et al. 2024, arXiv 2402.01306, equation 8: weight (1 - sigmoid(beta (gain - kl))) of a desirable answer and
weight (1 - sigmoid(beta (kl - gain))) of an undesirable one. gain is its log-ratio log(p / p_base). kl
estimates how far the model as a whole is from the base: the mean gain of answers that belong to other prompts, at
least 0, without a gradient. Each row brings one: its prompt with the answer of the next row (data/answer_samples.py).
The paper takes a micro batch's; here they are all of the step before, so that neither micro batches nor ranks
change a loss, and 0 in the first step, where the model is the base.
"""

from dataclasses import dataclass

from ..cli.parser import above_zero, not_negative
from ..config.objective import BASE, Figure, Losses
from ..config.setting import setting
from .answers import ACCURACY, MARGIN, Answers, OfAnswers


@dataclass(frozen=True)
class KTO(OfAnswers):
    """margin is beta (gain - kl) of desirable answers, and beta (kl - gain) of the others; accuracy is the share of
    answers with a margin above 0."""

    name = "kto"
    text = "desirable answers likelier, undesirable ones less, relative to the base"
    rows = ("labels",)
    unit = "answer"
    needs = (BASE,)
    figures = (ACCURACY, MARGIN, Figure("kl"))
    beta: float = setting(
        0.1,
        "how much the gain of an answer weighs; the higher, the nearer the model stays to its base",
        flag="kto_beta",
        type=above_zero,
    )
    desirable: float = setting(
        1.0,
        "weight of desirable answers; where they are fewer, raise it until weight times number is alike",
        flag="kto_desirable",
        type=not_negative,
    )
    undesirable: float = setting(1.0, "weight of undesirable answers", flag="kto_undesirable", type=not_negative)

    def losses(self, answers: Answers) -> Losses:
        assert answers.labels is not None
        gain, mismatched = answers.gains
        kl = max(0.0, answers.figures.get("kl", 0.0))
        margin = self.beta * (gain - kl).where(answers.labels, kl - gain)
        weight = margin.new_full((), self.desirable).where(answers.labels, self.undesirable)
        figures = {"accuracy": margin > 0, "margin": margin, "kl": mismatched}
        return weight * (1 - margin.sigmoid()), figures

    def describe(self) -> str:
        return f"KTO: {self.text}, beta {self.beta:g}, weights {self.desirable:g} and {self.undesirable:g}"
