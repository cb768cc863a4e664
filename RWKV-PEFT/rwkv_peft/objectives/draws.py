"""The base class of objectives on completions that the model samples itself, to --data_type prompts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cli.parser import above_zero, positive, share, stop_text
from ..config.objective import Objective
from ..config.setting import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draws(Objective):
    """Settings of sampling. A batch of rollouts (training/rollout.py) has besides its tokens, targets, mask, counted
    and cu_seqlens

    - lengths (answers,): the tokens of each answer, its end included
    - sampled (n,): the log-probability of each of them when it was sampled
    - shares (answers,): how much each counts, and mean_length: their mean number of tokens that count, of all answers
      of a step
    - advantages (answers,), if rewards judge them
    - prompts and limit: the number of prompts, and --max_completion_length
    """

    draw_temperature: float = setting(
        1.0,
        "prompts: temperature of drawing, and in grpo of the probabilities that are learned",
        flag="temperature",
        type=above_zero,
    )
    top_p: float = setting(
        1.0, "prompts: draw from the most probable tokens that reach this probability together", type=share
    )
    stop: tuple[str, ...] = setting(
        (),
        r"prompts: also end answers at these texts; \n and \t are newline and tab (always: at the end of the document, "
        "and at the next turn of a known layout)",
        flag="draw_stop",
        type=stop_text,
        metavar="TEXT",
    )
    batch: int = setting(64, "prompts: answers of a device that are drawn at a time", flag="draw_batch", type=positive)
    learned: int | None = setting(
        None,
        "prompts: learn from so many answers of a device at a time, and add their gradients up: less memory, the same "
        "step (default: from all of a micro batch)",
        flag="learn_batch",
        type=positive,
    )

    def share(self, cut: bool) -> float:
        """The weight of a completion in the loss; `cut` is true if it was cut at --max_completion_length."""
        return 1.0

    def advantages(self, rewards: "Tensor") -> "Tensor":
        """rewards (prompts, answers), NaN for none -> advantages alike; only objectives that need REWARDS have them."""
        raise NotImplementedError
