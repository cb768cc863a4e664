"""The training step of objectives that learn from the model's own answers: draw, judge, learn.

With --draw_ahead a step takes up the answers that were drawn before the step before it learned, and draws those of the
next before it learns itself: rewards judge them, in processes of their own, while it does. Checkpoints keep them
(answers.py).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ...data.answer_samples import PromptSamples
from ...models.parts import LanguageModel
from ...objectives.draws import Draws
from ...rewards import Judged, Rewards
from ..step.forked import forked, on_device
from ..step.steps import Batch, Whole, add, delivered
from .answers import Drawn, Manner, draw, packed, read_drawn, write_drawn

Judgement = Callable[[], Judged]  # waits for it
LARGEST = ("gap_max",)  # figures that are no means


class Place(NamedTuple):
    """The place of a rank's prompts: micro_bsz in a micro batch, the first ones of two micro batches `apart`,
    accumulate micro batches in a step; `end` of them in a run, of all ranks."""

    micro_bsz: int
    apart: int
    accumulate: int
    end: int

    def firsts(self, first: int) -> range:
        """The numbers of the first prompts of a step's micro batches; `first` is that of the first one."""
        return range(first, first + self.apart * self.accumulate, self.apart)

    def numbers(self, first: int) -> list[int]:
        """The numbers of a step's prompts."""
        return [begin + row for begin in self.firsts(first) for row in range(self.micro_bsz)]


class Drawing(Whole):
    """Before its first micro batch a step draws the answers to all of its prompts, and has them judged if its objective
    needs rewards; then it learns from them as any Step does.

    A batch of it is a list of parts, each as Draws describes it, whose gradients are added up.

    times: answers to a prompt; moved: hears of each answer. records, seconds and most, which log.py reads, are the
    newest step's answers with their rewards, [] if it learned from those of the step before; the seconds that its parts
    took; and those of the objective's figures that are no means but the largest of a step, by name.
    """

    objective: Draws

    def __init__(
        self,
        objective: Draws,
        manner: Manner,
        rewards: Rewards | None,
        teacher: nn.Module | None,
        times: int,
        place: Place,
        moved: Callable[[str], object],
    ) -> None:
        super().__init__(objective, teacher=teacher)
        self.manner, self.rewards, self.times, self.place, self.moved = manner, rewards, times, place, moved
        self.ready: dict[int, dict[str, Any]] = {}  # batches by the number of their first prompt
        self.drawn: dict[int, list[Drawn]] = {}  # answers that were drawn ahead, by the numbers of their prompts
        self.judging: Judgement | None = None  # of these; None if they are of a checkpoint
        self.records: list[dict[str, Any]] = []
        self.seconds = {"draw_s": 0.0, "judge_s": 0.0}
        self.most: dict[str, torch.Tensor] = {}

    def completed(self, model: nn.Module, batch: Mapping[str, Any]) -> Batch:
        first = batch["samples"].original(batch["first"])
        if first not in self.ready:
            self.ready = self.prepared(model, batch["samples"], first, batch["tokens"].device)
        return self.ready[first]

    def loss(self, model: nn.Module, batch: Mapping[str, Any], count: float) -> torch.Tensor:
        parts = batch["parts"]
        if len(parts) == 1:
            return self.part_loss(model, parts[0], count)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sums: list[torch.Tensor] = []
        losses, measures = [], []
        for part in parts:
            loss = self.part_loss(model, part, count)
            add(sums, torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
            losses.append(loss.detach())
            measures.append(self.measures)
        self.measures = {name: torch.stack([each[name] for each in measures]).sum() for name in self.measures}
        return delivered(torch.stack(losses).sum(), sums, parameters)

    def part_loss(self, model: nn.Module, part: Batch, count: float) -> torch.Tensor:
        loss = super().loss(model, part, count)
        self.measures, found = dict(self.measures), self.most
        self.most = {name: self.measures.pop(name) for name in LARGEST if name in self.measures}
        self.most = {name: value.maximum(found.get(name, value)) for name, value in self.most.items()}
        return loss

    def prepared(
        self, model: nn.Module, samples: PromptSamples, first: int, device: torch.device
    ) -> dict[int, dict[str, Any]]:
        """Draw and judge the answers of a step from original sample `first` on -> its batches by their first ones."""
        numbers, after = self.place.numbers(first), self.place.firsts(first).stop
        self.seconds = {"draw_s": 0.0, "judge_s": 0.0}
        if all(len(self.drawn.get(number, ())) == self.times for number in numbers):
            answers = [answer for number in numbers for answer in self.drawn[number]]
            judgement = self.judging or self.judgement(samples, numbers, answers)
        else:
            answers, judgement = self.asked(model, samples, numbers, self.times)
        judged = self.waited(judgement)
        self.drawn, self.judging = {}, None
        if self.objective.ahead and after < self.place.end:
            others = self.place.numbers(after)
            found, self.judging = self.asked(model, samples, others, self.times)
            self.drawn = {n: found[self.times * at :][: self.times] for at, n in enumerate(others)}
        advantages = self.advantages(judged)
        mean = over_ranks(self.counted(answers) / len(answers), device)
        self.records = self.told(samples, numbers, answers, judged, advantages.tolist())
        rows, times = self.place.micro_bsz * self.times, self.times
        cuts = pieces(rows, times, self.objective.learned or rows)

        def part(place: int, cut: slice) -> dict[str, Any]:
            here = slice(place * rows + cut.start, place * rows + cut.stop)
            return self.laid(answers[here], times, advantages[here], mean, device)

        begins = enumerate(self.place.firsts(first))
        return {begin: {"parts": [part(place, cut) for cut in cuts]} for place, begin in begins}

    def laid(
        self, answers: Sequence[Drawn], times: int, advantages: torch.Tensor, mean: float, device: torch.device
    ) -> dict[str, Any]:
        """The batch of answers, `times` to a prompt, as Draws describes it; advantages are none without rewards."""
        batch = packed(answers)
        batch |= {"shares": torch.tensor([self.objective.share(answer.cut) for answer in answers])}
        batch |= {"advantages": advantages.float()} if len(advantages) else {}
        batch |= {"old": batch["sampled"]} if self.objective.ahead else {}  # the model has changed since
        numbers = {"prompts": len(answers) / times, "limit": self.manner.longest, "mean_length": max(mean, 1.0)}
        batch |= {name: torch.tensor(float(number)) for name, number in numbers.items()}
        return on_device(batch | forked(batch, min(times, len(answers))), device)

    def keep(self, folder: Path, rank: int) -> None:
        write_drawn(folder, rank, self.drawn)

    def restore(self, checkpoint: Path) -> None:
        self.drawn = read_drawn(checkpoint) if self.objective.ahead else {}

    def counted(self, answers: Sequence[Drawn]) -> float:
        """The number of tokens of answers that count in the loss."""
        return sum(len(answer.tokens) * self.objective.share(answer.cut) for answer in answers)

    def advantages(self, judged: Judged) -> torch.Tensor:
        """The advantages of the answers that were judged (answers,); of none (0,)."""
        rewards = torch.tensor([math.nan if total is None else total for total in judged.total], dtype=torch.float64)
        return self.objective.advantages(rewards.view(-1, self.times)).flatten() if len(rewards) else rewards

    def asked(
        self, model: nn.Module, samples: PromptSamples, numbers: Sequence[int], times: int
    ) -> tuple[list[Drawn], Judgement]:
        """Draw `times` answers to samples, and begin to have them judged, if they are to be."""
        assert isinstance(model, LanguageModel)
        began = time.perf_counter()
        groups = draw(model, self.manner, samples, numbers, times, self.moved)
        answers = [answer for group in groups for answer in group]
        self.seconds["draw_s"] += time.perf_counter() - began
        return answers, self.judgement(samples, numbers, answers)

    def judgement(self, samples: PromptSamples, numbers: Sequence[int], answers: Sequence[Drawn]) -> Judgement:
        """Begin to have the answers to samples judged, as many to each, if they are to be."""
        if self.rewards is None:
            return lambda: Judged([], {})
        prompts = [self.manner.tokenizer.decode(answer.prompt) for answer in answers]
        rows = [row for number in numbers for row in [samples.row(number)] * (len(answers) // len(numbers))]
        return self.rewards.ask(prompts, [answer.text for answer in answers], rows)

    def waited(self, judgement: Judgement) -> Judged:
        """Wait for answers to be judged."""
        began = time.perf_counter()
        judged = judgement()
        self.moved("the judged answers")
        self.seconds["judge_s"] += time.perf_counter() - began
        return judged

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The sum over the prompts of a batch for validation, of one answer to each: of the rewards, below 0; without
        them the mean loss of the answers' tokens, times the number of prompts."""
        samples, first, device = batch["samples"], batch["first"], batch["tokens"].device
        numbers = range(first, min(first + self.place.micro_bsz, len(samples)))
        seconds, most = dict(self.seconds), self.most
        answers, judged = list[Drawn](), Judged([], {})
        if numbers:
            answers, judgement = self.asked(model, samples, numbers, 1)
            judged = self.waited(judgement)
        if self.rewards is None and answers:
            mean = self.counted(answers) / len(answers)
            loss = self.part_loss(model, self.laid(answers, 1, torch.zeros(0), mean, device), 1)
        elif self.rewards is None:
            loss = torch.zeros((), device=device)
            self.measures = {figure.name: loss for figure in self.objective.figures}
        else:
            reward = torch.tensor(sum(total or 0.0 for total in judged.total), device=device)
            self.measures, loss = {"reward": reward}, -reward
        self.seconds, self.most = seconds, most
        return loss

    def items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        rows = min(self.place.micro_bsz, max(0, len(batch["samples"]) - batch["first"]))
        return torch.tensor(float(rows), device=batch["tokens"].device)

    def told(
        self,
        samples: PromptSamples,
        numbers: Sequence[int],
        answers: Sequence[Drawn],
        judged: Judged,
        advantages: Sequence[float],
    ) -> list[dict[str, Any]]:
        """The records of answers: the sample and row of each, and how it was judged, if it was."""
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
            }
            | (
                {
                    "reward": judged.total[place],
                    "rewards": {name: values[place] for name, values in judged.each.items()},
                    "advantage": advantages[place],
                }
                if judged.total
                else {}
            )
            for place, (owner, answer) in enumerate(zip(owners, answers))
        ]


def pieces(rows: int, times: int, most: int) -> list[slice]:
    """Cut `rows` answers, `times` to a prompt, into pieces of at most `most`: of whole groups, or each within one."""
    size = most // times * times
    if size:
        return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
    starts = [(group, first) for group in range(0, rows, times) for first in range(group, group + times, most)]
    return [slice(first, min(first + most, group + times)) for group, first in starts]


def over_ranks(number: float, device: torch.device) -> float:
    """The mean of a number over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
