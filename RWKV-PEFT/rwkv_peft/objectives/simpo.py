"""SimPO: make the better of two answers likelier a token than the worse, by a margin and without a reference model.

Meng et al. 2024, arXiv 2405.14734, equation 6: -log sigmoid(beta (chosen - rejected) - gamma), with the mean
log-probability of each answer's tokens.
"""

from dataclasses import dataclass

from ..cli.parser import above_zero, not_negative
from ..config.objective import Losses
from ..config.setting import setting
from .answers import ACCURACY, MARGIN, NLL, Answers, OfAnswers


@dataclass(frozen=True)
class SimPO(OfAnswers):
    """margin is beta (chosen - rejected), to exceed gamma; nll is the mean loss of the chosen answer's tokens."""

    name = "simpo"
    text = "the chosen answer likelier a token than the rejected"
    figures = (ACCURACY, MARGIN, NLL)
    beta: float = setting(
        2.0, "how much the difference between two answers weighs, in nats a token", flag="simpo_beta", type=above_zero
    )
    gamma: float = setting(
        1.0, "how far the chosen answer is to be above the rejected one", flag="simpo_gamma", type=not_negative
    )

    def losses(self, answers: Answers) -> Losses:
        from torch.nn.functional import softplus

        chosen, rejected = (answers.likelihood / answers.lengths).unbind(1)
        margin = self.beta * (chosen - rejected)
        return softplus(self.gamma - margin), {"accuracy": margin > 0, "margin": margin, "nll": -chosen}

    def describe(self) -> str:
        return f"SimPO: {self.text}, beta {self.beta:g}, gamma {self.gamma:g}"
