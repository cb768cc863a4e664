"""IPO: set two answers to a prompt a fixed distance apart, relative to the reference model.

Azar et al. 2023, arXiv 2310.12036, equation 17: (chosen - rejected - 1 / (2 tau))², with each answer's log-ratio
log(p / p_base). A log-ratio is the mean over the answer's tokens, as the authors compute it and trl does, so that long
answers do not weigh more; tau is beta here, as in trl.
"""

from dataclasses import dataclass

from ..cli.parser import above_zero
from ..config.objective import BASE, Losses
from ..config.setting import setting
from .answers import ACCURACY, CHOSEN, MARGIN, Answers, OfAnswers


@dataclass(frozen=True)
class IPO(OfAnswers):
    """margin is chosen - rejected, to become 1 / (2 beta) nats a token; chosen is the chosen answers' part."""

    name = "ipo"
    text = "a fixed margin between chosen and rejected answer, relative to the base"
    needs = (BASE,)
    figures = (ACCURACY, MARGIN, CHOSEN)
    beta: float = setting(
        0.1,
        "the margin between two answers is to be 1 / (2 beta) nats a token; the higher, the nearer the model stays to "
        "its base",
        flag="ipo_beta",
        type=above_zero,
    )

    def losses(self, answers: Answers) -> Losses:
        chosen, rejected = (gain / length for gain, length in zip(answers.gains, answers.lengths.unbind(1)))
        margin = chosen - rejected
        losses = (margin - 1 / (2 * self.beta)) ** 2
        return losses, {"accuracy": margin > 0, "margin": margin, "chosen": chosen}

    def describe(self) -> str:
        return f"IPO: {self.text}, {1 / (2 * self.beta):g} nats a token (beta {self.beta:g})"
