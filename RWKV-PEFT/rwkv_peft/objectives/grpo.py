"""GRPO and its kin: make the model's own completions of a prompt likelier if they earn more than the others.

An answer's advantage A compares its reward with its group's, the answers to the same prompt; ratio is the
probability of a token by the model over that by which it was drawn. A step minimizes the mean over answers of

    grpo      mean over tokens of -min(ratio A, clip(ratio) A), A = (reward - mean) / (std + 1e-4)
              (Shao et al. 2024, arXiv 2402.03300, equation 3)
    dr_grpo   the sum over tokens, divided by --max_completion_length, A = reward - mean: neither long answers nor
              groups of little spread weigh less or more (Liu et al. 2025, arXiv 2503.20783)
    dapo      as grpo, but each token of a step weighs the same, and clip's upper bound is higher
              (Yu et al. 2025, arXiv 2503.14476, equation 8)
    gspo      one ratio for an answer, the geometric mean of its tokens' (Zheng et al. 2025, arXiv 2507.18071,
              equations 5 to 7)
    rloo      one ratio for an answer, the product of its tokens', A = reward - mean of the others'
              (Ahmadian et al. 2024, arXiv 2402.14740)

and --kl_beta times an estimate of the distance from the base (Schulman's k3): exp(d) - d - 1 of each token with
d = log(p_base / p), averaged as tokens are; for rloo and gspo over an answer's sum and its mean. --entropy_bonus times
the entropy of the next token at each token, averaged alike, is taken off (Williams and Peng 1991, Function Optimization
Using Connectionist Reinforcement Learning Algorithms, section 4).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

from ..cli.parser import finite, not_negative, positive
from ..cli.rules import EXCLUDES, NEEDS, Rule
from ..config import TrainConfig
from ..config.objective import OF_BASE, REWARDS, Batch, Figure, Losses, Passes
from ..config.setting import setting
from .draws import Draws

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4  # beside the spread of a group's rewards, by which gains are divided
REWARD, LENGTH = Figure("reward", "reward", "reward"), Figure("length", "tokens of an answer", "tokens")
ENTROPY = Figure("entropy", "entropy of a draw", "nats")


class Variant(NamedTuple):
    """A variant of the loss: how far a ratio may go below and above 1; whole: an answer has one ratio."""

    low: float
    high: float
    whole: bool = False


VARIANTS = MappingProxyType(
    {
        "grpo": Variant(0.2, 0.2),
        "dr_grpo": Variant(0.2, 0.2),
        "dapo": Variant(0.2, 0.28),
        "gspo": Variant(3e-4, 4e-4, True),
        "rloo": Variant(0.2, 0.2, True),
    }
)


@dataclass(frozen=True)
class GRPO(Draws):
    """kl is the estimated distance from the base, in nats a token; clipped the share of tokens (gspo, rloo: of answers)
    with a clipped ratio. gap is the mean difference between a token's log-probability when it was sampled and when the
    step began to learn from it, which are computed in another order. gap_max is the largest of a step."""

    name = "grpo"
    text = "completions that the model samples itself, scored by --reward or by an --environment"
    rows = ("prompts",)
    unit = "prompt"
    pace = 0.3
    needs = (REWARDS,)
    figures = (REWARD, LENGTH, ENTROPY)
    excludes = (
        ("--peft lora-ga", "it begins with the gradient of another loss", "take another method"),
        ("--train_type infctx", "an answer is drawn and learned as a whole", "leave it out"),
    )
    rules = (
        Rule(
            "--objective grpo",
            NEEDS,
            "--reward, --environment",
            "that judges the answers",
            "name a task, or FILE.py:FUNCTION",
        ),
        Rule("--max_turns, --turn_tokens", NEEDS, "--environment", "it is about conversations with tools"),
        Rule("--reward_weights", NEEDS, "--reward", "it is a factor for each"),
        Rule("--objective grpo", EXCLUDES, "--num_generations 1", "an answer is compared with others to its prompt"),
        *(Rule("--kl_beta", EXCLUDES, *exclusion) for exclusion in OF_BASE),
    )
    form: str = setting(
        "grpo",
        "the loss: grpo; dr_grpo, which weighs neither length nor spread; dapo, by tokens; gspo and rloo, by whole "
        "answers",
        flag="grpo_loss",
        choices=tuple(VARIANTS),
    )
    reward: tuple[str, ...] = setting(
        (),
        "scores of completions: the right answer of a row (gsm8k, math, jsonl, choices: 1 if right), match:REGEX, "
        "json:SCHEMA.json, or FILE.py:FUNCTION, which runs that file; several are added up",
        metavar="REWARD",
    )
    weights: tuple[float, ...] = setting(
        (), "a factor for each --reward (default: 1)", flag="reward_weights", type=finite, metavar="N"
    )
    environments: tuple[str, ...] = setting(
        (),
        "prompts: hold conversations with tools: a class in the form of trl's environment_factory, as FILE.py:CLASS or "
        "module:CLASS, whose public methods are the tools, and whose get_reward, if it has one, scores a conversation; "
        "of several, as NAME=FILE.py:CLASS, a row's field environment names its own",
        flag="environment",
        metavar="CLASS",
    )
    max_turns: int = setting(8, "the most answers in a conversation with tools", type=positive)
    turn_tokens: int | None = setting(
        None,
        "the most tokens of an answer in a conversation; --max_completion_length counts all behind the prompt, results "
        "included (default: as many as that)",
        type=positive,
    )
    iterations: int = setting(
        1,
        "optimizer steps on one set of answers; from the second on, ratios are clipped",
        flag="num_iterations",
        type=positive,
    )
    kl_beta: float = setting(
        0.0, "also keep the model near its base: weight of the estimated distance", type=not_negative
    )
    entropy_bonus: float = setting(
        0.0, "also keep the entropy of the next token high: its weight, such as 0.01", type=not_negative
    )
    clip_low: float | None = setting(
        None, "a ratio below 1 less this is clipped (default: 0.2; gspo 3e-4)", type=not_negative
    )
    clip_high: float | None = setting(
        None, "a ratio above 1 plus this is clipped (default: --clip_low; else dapo 0.28, gspo 4e-4)", type=not_negative
    )
    mask_truncated: bool = setting(
        False, "answers that were cut at --max_completion_length are judged, and compared with, but not learned from"
    )

    @property
    def asks_base(self) -> bool:
        return self.kl_beta > 0

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds of an unclipped ratio."""
        form = VARIANTS[self.form]
        low = form.low if self.clip_low is None else self.clip_low
        high = form.high if self.clip_low is None else self.clip_low
        return 1 - low, 1 + (high if self.clip_high is None else self.clip_high)

    @property
    def together(self) -> int:
        return self.iterations

    def share(self, cut: bool) -> float:
        return float(not (self.mask_truncated and cut))

    def advantages(self, rewards: "Tensor") -> "Tensor":
        """0 for an answer without a reward."""
        known = rewards.isfinite()
        number = known.sum(1, keepdim=True)
        gains = (rewards - rewards.nansum(1, keepdim=True) / number.clamp_min(1)).nan_to_num(0.0)
        others = (number - 1).clamp_min(1)
        if self.form == "rloo":
            return gains * number / others
        if self.form == "dr_grpo":
            return gains
        return gains / ((gains**2).sum(1, keepdim=True) / others).sqrt().add(EPSILON)

    def loss(self, passes: Passes, batch: Batch, count: float) -> Losses:
        from .documents import drawn_log_probabilities, means

        lengths, form = batch["lengths"], VARIANTS[self.form]
        weight = batch["shares"] / len(lengths)  # of each answer, in the mean over prompts
        if self.form in ("dr_grpo", "dapo"):
            weight = weight * lengths / (batch["limit"] if self.form == "dr_grpo" else batch["mean_length"])
        of_token = (weight if self.form == "rloo" else weight / lengths) if self.entropy_bonus else None
        entropy, now = drawn_log_probabilities(passes.model, batch, self.draw_temperature, of_token)  # now (n,)
        drawn = batch["old"] if "old" in batch else now.detach()
        cast("dict[str, Tensor]", batch)["old"] = drawn  # for the steps that learn from the same answers again
        each = means(now - drawn, lengths) if form.whole else now - drawn
        if self.form == "rloo":
            each = each * lengths
        ratio = each.exp()
        advantage = (
            batch["advantages"] if form.whole else batch["advantages"].repeat_interleave(lengths, output_size=len(now))
        )
        low, high = self.bounds
        gain = (ratio * advantage).minimum(ratio.clamp(low, high) * advantage)
        losses = -gain if form.whole else means(-gain, lengths)  # (answers,), of a mean token if not of the whole
        clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
        gap = (drawn - batch["sampled"]).abs()
        figures = {
            "clipped": clipped.to(now.dtype) if form.whole else means(clipped.to(now.dtype), lengths),
            "gap": means(gap, lengths),
        }
        most = {"gap_max": gap.detach().max()}
        if self.asks_base:
            difference = drawn_log_probabilities(passes.base, batch, self.draw_temperature)[1] - now
            figures["kl"] = distance = means(difference.exp() - difference - 1, lengths)
            losses = losses + self.kl_beta * distance * (lengths if self.form == "rloo" else 1)
        prompts = self.items(batch) / count
        averages = {name: figure.detach().mean() * prompts for name, figure in figures.items()}
        return ((losses * weight).sum() - self.entropy_bonus * entropy) * prompts, averages | most

    def items(self, batch: Batch) -> "Tensor":
        return batch["prompts"]

    def describe(self) -> str:
        low, high = self.bounds
        kl = f", and {self.kl_beta:g} times the distance from the base" if self.asks_base else ""
        bonus = f", less {self.entropy_bonus:g} times the entropy" if self.entropy_bonus else ""
        judged = ", ".join((*self.reward, *self.environments))
        return f"{self.form}: {self.text} ({judged}), ratios from {low:g} to {high:g}{kl}{bonus}"

    def problems(self, train: TrainConfig) -> Iterator[str]:
        if repeated := [word for word in self.reward if self.reward.count(word) > 1]:
            yield f"--reward {repeated[0]} is given twice; give it a weight instead"
        if self.weights and len(self.weights) != len(self.reward):
            weights = " ".join(f"{weight:g}" for weight in self.weights)
            yield f"--reward_weights {weights}: there are {len(self.reward)} rewards; give a weight for each"
        for flag, number in (("epoch_steps", train.epoch_steps), ("save_every", train.save_every)):
            if number % self.iterations:
                yield (
                    f"--{flag} {number}: --num_iterations {self.iterations} steps learn from the same answers; give a "
                    "multiple of that"
                )
