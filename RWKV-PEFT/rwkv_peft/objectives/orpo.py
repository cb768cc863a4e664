"""ORPO: learn the better of two answers, and raise its odds above the worse one's, without a reference model.

Hong et al. 2024, arXiv 2403.07691, equations 6 and 7: the mean loss of the chosen answer's tokens, and lambda times
-log sigmoid(log odds(chosen) - log odds(rejected)). odds = p / (1 - p) of p, the geometric mean of the probabilities of
an answer's tokens.
"""

from dataclasses import dataclass

from ..cli.parser import not_negative
from ..config.objective import Losses
from ..config.setting import setting
from .answers import ACCURACY, MARGIN, NLL, Answers, OfAnswers

CERTAIN = -1e-6  # the largest log-probability whose odds are computed, because those of 0 are infinite


@dataclass(frozen=True)
class ORPO(OfAnswers):
    """margin is the logarithm of the ratio of the odds; nll is the mean loss of the chosen answer's tokens."""

    name = "orpo"
    pace = 1.0  # most of its loss is that of next tokens
    text = "the loss of the chosen answer, and its odds above those of the rejected"
    figures = (ACCURACY, MARGIN, NLL)
    weight: float = setting(
        0.1, "how much the ratio of the odds weighs beside the loss", flag="orpo_lambda", type=not_negative
    )

    def losses(self, answers: Answers) -> Losses:
        from torch.nn.functional import softplus

        mean = answers.likelihood / answers.lengths
        certain = mean.clamp_max(CERTAIN)
        chosen, rejected = (certain - (-certain.expm1()).log()).unbind(1)  # log odds
        margin, nll = chosen - rejected, -mean[:, 0]
        return nll + self.weight * softplus(-margin), {"accuracy": margin > 0, "margin": margin, "nll": nll}

    def describe(self) -> str:
        return f"ORPO: {self.text}, lambda {self.weight:g}"
