"""The training step of objectives that learn from the model's own answers: draw, judge, learn."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...config import RunConfig
from ...data.prompt_samples import PromptSamples
from ...data.recorded import find_tokenizer
from ...data.samples import Samples
from ...models.parts import LanguageModel
from ...objectives.grpo import GRPO
from ...rewards import Judged, Rewards
from ..step.forked import forked, on_device
from ..step.steps import Batch, Whole
from .answers import Drawn, Manner, draw, packed


class Drawing(Whole):
    """Before its first micro batch a step draws the answers to all of its prompts and has them judged; then it learns
    from them as any Step does.

    times: answers to a prompt; apart: how far apart the prompts of two micro batches of a rank lie; accumulate: micro
    batches of a step; moved: hears of each answer. records and seconds, which log.py reads, are the newest step's
    answers with their rewards, [] if it learned from those of the step before, and the seconds that its parts took.
    """

    objective: GRPO

    def __init__(
        self,
        objective: GRPO,
        manner: Manner,
        rewards: Rewards,
        times: int,
        micro_bsz: int,
        apart: int,
        accumulate: int,
        moved: Callable[[str], object],
    ) -> None:
        super().__init__(objective)
        self.manner, self.rewards, self.times, self.moved = manner, rewards, times, moved
        self.micro_bsz, self.apart, self.accumulate = micro_bsz, apart, accumulate
        self.ready: dict[int, dict[str, Any]] = {}  # batches by the number of their first prompt
        self.records: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def completed(self, model: nn.Module, batch: Mapping[str, Any]) -> Batch:
        first = batch["samples"].original(batch["first"])
        if first not in self.ready:
            self.ready = self.prepared(model, batch["samples"], first, batch["tokens"].device)
        return self.ready[first]

    def prepared(
        self, model: nn.Module, samples: PromptSamples, first: int, device: torch.device
    ) -> dict[int, dict[str, Any]]:
        """Draw and judge the answers of a step whose first prompt is `first` -> its batches by their first prompts, all
        with the numbers of original samples."""
        firsts = [first + number * self.apart for number in range(self.accumulate)]
        numbers = [begin + row for begin in firsts for row in range(self.micro_bsz)]
        groups, judged = self.answered(model, samples, numbers, self.times)
        rewards = torch.tensor([math.nan if total is None else total for total in judged.total], dtype=torch.float64)
        advantages = self.objective.advantages(rewards.view(-1, self.times)).flatten()
        answers = [answer for group in groups for answer in group]
        weights = [float(not (self.objective.mask_truncated and answer.cut)) for answer in answers]
        size = sum(len(answer.tokens) * weight for answer, weight in zip(answers, weights))
        mean = over_ranks(size / len(answers), device)
        same = {"prompts": float(self.micro_bsz), "limit": float(self.manner.longest), "mean_length": max(mean, 1.0)}
        self.records = self.told(samples, numbers, answers, judged, advantages.tolist())
        rows = self.micro_bsz * self.times
        batches = {}
        for place, begin in enumerate(firsts):
            part = slice(place * rows, (place + 1) * rows)
            batch = packed(answers[part])
            batch["advantages"], batch["weights"] = advantages[part].float(), torch.tensor(weights[part])
            batch |= {name: torch.tensor(number) for name, number in same.items()}
            batches[begin] = on_device(batch | forked(batch, self.times), device)
        return batches

    def answered(
        self, model: nn.Module, samples: PromptSamples, numbers: Sequence[int], times: int
    ) -> tuple[list[list[Drawn]], Judged]:
        """Draw `times` answers to samples, and have them judged."""
        assert isinstance(model, LanguageModel)
        began = time.perf_counter()
        groups = draw(model, self.manner, samples, numbers, times, self.moved)
        between = time.perf_counter()
        prompts = [self.manner.tokenizer.decode(group[0].prompt) for group in groups for _ in group]
        rows = [row for number in numbers for row in [samples.row(number)] * times]
        judged = self.rewards.judge(prompts, [answer.text for group in groups for answer in group], rows)
        self.moved("the judged answers")
        self.seconds = {"draw_s": between - began, "judge_s": time.perf_counter() - between}
        return groups, judged

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The sum of the rewards, below 0, of one answer to each prompt of a batch for validation."""
        samples, first = batch["samples"], batch["first"]
        numbers = range(first, min(first + self.micro_bsz, len(samples)))
        seconds = self.seconds
        _, judged = self.answered(model, samples, numbers, 1) if numbers else ([], Judged([], {}))
        self.seconds = seconds
        reward = torch.tensor(sum(total or 0.0 for total in judged.total), device=batch["tokens"].device)
        self.measures = {"reward": reward}
        return -reward

    def items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        rows = min(self.micro_bsz, max(0, len(batch["samples"]) - batch["first"]))
        return torch.tensor(float(rows), device=batch["tokens"].device)

    def told(
        self,
        samples: PromptSamples,
        numbers: Sequence[int],
        answers: Sequence[Drawn],
        judged: Judged,
        advantages: Sequence[float],
    ) -> list[dict[str, Any]]:
        """What is written down of answers: of which sample and row each is, and how it was judged."""
        owners = [number for number in numbers for _ in range(self.times)]
        return [
            {
                "sample": owner,
                "row": samples.place(owner),
                "prompt": self.manner.tokenizer.decode(answer.prompt),
                "completion": answer.text,
                "end": answer.end,
                "length": len(answer.tokens),
                "entropy": math.fsum(answer.entropies) / len(answer.entropies),
                "reward": judged.total[place],
                "rewards": {name: values[place] for name, values in judged.each.items()},
                "advantage": advantages[place],
            }
            for place, (owner, answer) in enumerate(zip(owners, answers))
        ]


def over_ranks(number: float, device: torch.device) -> float:
    """The mean of a number over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def drawing_of(
    config: RunConfig, samples: Samples, rewards: Rewards, ranks: int, moved: Callable[[str], object]
) -> Drawing:
    """Make the Drawing of a run on so many ranks."""
    objective, data = config.objective, config.data
    assert isinstance(objective, GRPO)
    tokenizer = find_tokenizer(None, config.model.vocab_size, samples.vocabulary)
    return Drawing(
        objective,
        Manner.of(config, objective, tokenizer),
        rewards,
        data.num_generations,
        data.micro_bsz,
        data.micro_bsz * ranks,
        config.train.accumulate_grad_batches,
        moved,
    )
