"""Distillation: match a teacher's probabilities at each token that counts. The teacher is another model with the same
tokens, or the model as it was before training, which reads a context that its student does not see (context
distillation: Askell et al. 2021, arXiv 2112.00861, section 2.1; Snell et al. 2022, arXiv 2209.15189).

The loss is weight times the divergence from the teacher's distribution (divergence.py), and 1 - weight times the
cross-entropy of the next token (Hinton et al. 2015, arXiv 1503.02531). The tokens come from rows, or from completions
that the student samples to prompts: it then learns at the places to which its own tokens lead, as in GKD (Agarwal et
al. 2024, arXiv 2306.13649).
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..cli.parser import above_zero, constrained, open_share, share
from ..cli.rules import EXCLUDES, NEEDS, Rule
from ..config.objective import TEACHER, Batch, Figure, Losses, Passes, number_of_tokens
from ..config.setting import setting
from .draws import Draws

if TYPE_CHECKING:
    from torch import Tensor

OF_DRAWING = "--temperature, --top_p, --draw_stop, --draw_batch, --learn_batch"
FORWARD, REVERSE, JSD = "forward", "reverse", "jsd"
WORDS = MappingProxyType(
    {FORWARD: "KL(teacher | student)", REVERSE: "KL(student | teacher)", JSD: "Jensen-Shannon divergence"}
)


@dataclass(frozen=True)
class Distill(Draws):
    """kl is the divergence from the teacher, nll the cross-entropy of the next token, both means over the tokens that
    count; of sampled completions, nll is low if the student is sure of its own tokens. A batch may have other tokens
    for the teacher (training/step/shared_prefix.py), in which as many count."""

    name = "distill"
    text = "nearness to a teacher's probabilities of each token that counts"
    rows = ("binidx", "contexts", "prompts", "sft")
    needs = (TEACHER,)
    excludes = (
        ("--peft lora-ga", "it begins with the gradient of another loss", "take another method"),
        ("--train_type infctx", "the teacher reads whole rows", "leave it out, and take shorter rows"),
    )
    rules = (
        Rule(
            "--objective distill",
            NEEDS,
            "--teacher_model, --data_type contexts",
            "it learns from one",
            "name a .pth of the same tokens, or give rows with contexts, in which the model teaches itself",
        ),
        Rule("--distill_beta", NEEDS, "--distill_kl jsd", "it weighs the parts of that"),
        Rule("--distill_weight", EXCLUDES, "--data_type prompts", "the student's own words are no example to follow"),
        Rule(OF_DRAWING, EXCLUDES, "--data_type !prompts", "it is about drawn answers"),
    )
    figures = (Figure("kl", "divergence from the teacher"), Figure("nll"))
    teacher: str = setting(
        "", "the teacher, a .pth with the student's vocabulary, of any size and generation", flag="teacher_model"
    )
    kind: str = setting(
        FORWARD,
        "forward: KL(teacher | student), which covers all of the teacher's modes; reverse: KL(student | teacher), "
        "which seeks the largest; jsd: the generalized Jensen-Shannon divergence between them",
        flag="distill_kl",
        choices=(FORWARD, REVERSE, JSD),
    )
    beta: float = setting(
        0.5,
        "jsd: share of the teacher in the mean that both are compared with; near 0 it is like forward, near 1 like "
        "reverse",
        flag="distill_beta",
        type=open_share,
    )
    temperature: float = setting(
        1.0,
        "divides the logits of both; above 1 the unlikely tokens count more",
        flag="distill_temperature",
        type=above_zero,
    )
    weight: float = setting(
        1.0,
        "weight of the divergence in the loss, above 0 and at most 1; the rest is that of the next token's "
        "cross-entropy",
        flag="distill_weight",
        type=constrained(share, lambda value: value > 0, "is not above 0"),
    )

    def loss(self, passes: Passes, batch: Batch, count: float) -> Losses:
        from .divergence import Divergence, linear_divergence

        counted = batch.get("teacher_counted", batch["counted"])
        divisor: float | Tensor = count
        if "lengths" in batch:  # the items of drawn answers are prompts, because their tokens are not known before
            divisor = count * batch["mean_length"] * len(batch["lengths"]) / batch["prompts"]
        # before the student's pass, so that the activations of both are never alive together
        teacher = passes.teacher(lambda x, weight: (x.reshape(-1, x.shape[-1])[counted], weight))
        settings = Divergence(self.kind, self.beta, self.temperature, self.weight)

        def head(x: "Tensor", weight: "Tensor") -> "Tensor":
            of, weights = (batch["targets"], batch["counted"]), batch.get("weights")
            return linear_divergence((x, weight), teacher, *of, divisor, settings, weights)

        loss, kl, nll = passes.model(head)
        return loss, {"kl": kl.detach(), "nll": nll.detach()}

    def items(self, batch: Batch) -> "Tensor":
        return number_of_tokens(batch)

    def describe(self) -> str:
        words = f"{WORDS[self.kind]}{f', beta {self.beta:g}' if self.kind == JSD else ''}"
        rest = f", and {1 - self.weight:g} times the next token's loss" if self.weight < 1 else ""
        return f"distillation: {self.weight:g} times {words}, temperature {self.temperature:g}{rest}"
