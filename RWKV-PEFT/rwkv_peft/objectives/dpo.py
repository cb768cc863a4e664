"""DPO: make the better of two answers to a prompt likelier than the worse, relative to the reference model.

Rafailov et al. 2023, arXiv 2305.18290, equation 7: -log sigmoid(beta (chosen - rejected)), with each answer's
log-ratio log(p / p_base).
"""

from dataclasses import dataclass

from ..cli.parser import above_zero, not_negative
from ..config.objective import BASE, Losses
from ..config.setting import setting
from .answers import ACCURACY, CHOSEN, MARGIN, Answers, OfAnswers


@dataclass(frozen=True)
class DPO(OfAnswers):
    """nll adds so many times the mean loss of the chosen answer's tokens (Pang et al. 2024, arXiv 2404.19733, with
    the same default: without it a few pairs make the chosen answers unlikely, docs/guides/preferences.md).

    accuracy is the share of pairs with a margin, beta (chosen - rejected), above 0; chosen is the chosen answers'
    part of it, which is below 0 if they become less likely themselves.
    """

    name = "dpo"
    text = "the chosen answer above the rejected, relative to the base"
    needs = (BASE,)
    figures = (ACCURACY, MARGIN, CHOSEN)
    beta: float = setting(
        0.1,
        "weight of the margin between two answers; the higher, the nearer the model stays to its base",
        flag="dpo_beta",
        type=above_zero,
    )
    nll: float = setting(
        1.0,
        "also add the chosen answers' own loss, times this, which keeps them likely; 0: the margin alone, as in DPO's "
        "paper",
        flag="dpo_nll",
        type=not_negative,
    )

    def losses(self, answers: Answers) -> Losses:
        from torch.nn.functional import softplus

        chosen, rejected = answers.gains
        margin = self.beta * (chosen - rejected)
        losses = softplus(-margin) - self.nll * answers.likelihood[:, 0] / answers.lengths[:, 0]
        return losses, {"accuracy": margin > 0, "margin": margin, "chosen": self.beta * chosen}

    def describe(self) -> str:
        nll = f", and {self.nll:g} times the loss of the chosen one" if self.nll else ""
        return f"DPO: {self.text}, beta {self.beta:g}{nll}"
