"""Rollouts: completions that the model in training samples itself, several to a prompt, and the step that learns from
them.

A step samples the completions of all of its prompts before its first micro batch, has rewards judge them if its
objective needs some, and then learns from them as from any batch.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..checkpoints.atomic import append_text
from ..cli.errors import UserError
from ..config import RunConfig
from ..data.answer_samples import PromptSamples
from ..data.chat import stops_of
from ..data.samples import collate_packed
from ..data.tokenizer import Tokenizer
from ..evals.questions import sample
from ..inference.flags import unescaped
from ..inference.loading import Subject
from ..inference.settings import Sampling
from ..models.parts import LanguageModel
from ..objectives.draws import Draws
from ..rewards import Judged, Rewards
from .engine import TrainingEngine
from .step.compiling import uncompiled
from .step.plan import Plan
from .step.shared_prefix import share_prefixes
from .step.steps import Batch, Whole, add_gradients, to_device, trainable, with_gradients
from .turns import TURN_CUT, Episode, EpisodeSampler

SEEDS = 1 << 44  # more than the completions that any run samples: no two seeds of a run share a draw
LARGEST = ("gap_max",)  # figures that are maxima; the others are means
SCORE = "environment"  # the name of the reward that get_reward is
CUT = ("length", TURN_CUT)  # ends of completions that a limit has cut
QUOTED = 200  # characters of a row in a note
FLAT = 10  # steps in a row without spread of rewards, after which a run says so


class Rollout(NamedTuple):
    """A completion: the tokens of its prompt, those behind it, with the one that ends it, the log-probabilities and
    entropies of those that the model sampled, its text, and its end: "end" (of the document), "stop" or a value of CUT.

    Of a conversation with tools, `sampled` says which tokens the model sampled ([]: all), text is the last answer,
    turns are all texts behind the prompt by role, score is its environment's, and state that environment's attributes.
    One with a fault, the message of its environment, is neither judged nor learned from."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    entropies: list[float]
    text: str
    end: str
    sampled: list[bool] = []
    turns: list[dict[str, str]] = []
    score: float | None = None
    state: dict[str, Any] = {}
    fault: str = ""

    @classmethod
    def of(cls, episode: Episode) -> "Rollout":
        """The Rollout of an episode."""
        turns = episode.turns
        text = next((turn["content"] for turn in reversed(turns) if turn["role"] == "assistant"), "")
        measured = episode.prompt, episode.tokens, episode.logprobs, episode.entropies
        return cls(*measured, text, episode.end, episode.sampled, turns, episode.score, episode.state, episode.fault)

    @property
    def cut(self) -> bool:
        return self.end in CUT


class RolloutSettings(NamedTuple):
    """How completions are sampled: at most `longest` tokens, up to a text of `stop` or of a known layout, `batch` at a
    time; compiles: the run compiles blocks."""

    sampling: Sampling
    longest: int
    stop: tuple[str, ...]
    batch: int
    tokenizer: Tokenizer
    compiles: bool

    @classmethod
    def of(cls, config: RunConfig, objective: Draws, tokenizer: Tokenizer) -> "RolloutSettings":
        # Room for a seed of its own for each completion of the run.
        seed = config.train.random_seed * SEEDS
        sampling = Sampling(temperature=objective.draw_temperature, top_p=objective.top_p, seed=seed, measured=True)
        stop = tuple(map(unescaped, objective.stop))
        return cls(sampling, config.data.max_completion_length, stop, objective.batch, tokenizer, config.train.compile)


class PromptPlan(NamedTuple):
    """The numbers of a rank's prompts: micro_bsz in a micro batch, the first ones of two micro batches `apart`,
    accumulate micro batches in a step."""

    micro_bsz: int
    apart: int
    accumulate: int

    def firsts(self, first: int) -> range:
        """The numbers of the first prompts of a step's micro batches; `first` is the first one's."""
        return range(first, first + self.apart * self.accumulate, self.apart)

    def numbers(self, first: int) -> list[int]:
        """The numbers of a step's prompts."""
        return [begin + row for begin in self.firsts(first) for row in range(self.micro_bsz)]


def sample_rollouts(
    model: LanguageModel, settings: RolloutSettings, prompts: Mapping[int, list[int]], times: int
) -> list[list[Rollout]]:
    """Sample `times` Rollouts of each prompt, {number: token ids}, with adapters on. The draws of a completion depend
    on the run's seed, the prompt's number and its own alone."""
    tokenizer = settings.tokenizer
    stops = {number: (*stops_of(tokenizer.decode(prompt)), *settings.stop) for number, prompt in prompts.items()}
    # The key seeds the completion's draws, so that they do not depend on the batch or the rank that has the prompt.
    requests = {number * times + place: prompt for number, prompt in prompts.items() for place in range(times)}
    rollouts: dict[int, Rollout] = {}
    trains = model.training
    model.eval()
    with uncompiled(settings.compiles):
        for completion in sample(
            Subject(model, model.tuned_states(), tokenizer),
            requests,
            {key: stops[key // times] for key in requests},
            settings.sampling,
            settings.longest,
            settings.batch,
        ):
            key, tokens, text, end, logprobs, entropies = completion
            rollouts[key] = Rollout(requests[key], tokens, logprobs, entropies, text, end)
    model.train(trains)
    return [[rollouts[number * times + place] for place in range(times)] for number in prompts]


def sample_episodes(
    model: LanguageModel,
    settings: RolloutSettings,
    episodes: EpisodeSampler,
    rows: Mapping[int, Mapping[str, Any]],
    times: int,
) -> list[list[Rollout]]:
    """Hold `times` conversations of each row, {number: row}, with adapters on -> their Rollouts."""
    trains = model.training
    model.eval()
    with uncompiled(settings.compiles):
        groups = episodes.sample(Subject(model, model.tuned_states(), settings.tokenizer), rows, times)
    model.train(trains)
    return [list(map(Rollout.of, group)) for group in groups]


def packed(rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
    """A batch of whole rows, each a prompt with a completion, as collate_packed makes it; with the completions' lengths
    (answers,) and the log-probabilities by which they were sampled (n,)."""
    documents = []
    for rollout in rollouts:
        tokens = torch.tensor([*rollout.prompt, *rollout.tokens])
        # (T - 1,): position t predicts token t + 1; the prompt's last position predicts the completion's first token.
        counts = torch.arange(1, len(tokens)) >= len(rollout.prompt)
        if rollout.sampled:
            # Results of tools stand among the answers, and the model learns nothing from them.
            counts[len(rollout.prompt) - 1 :] = torch.tensor(rollout.sampled)
        documents.append((tokens, counts))
    return collate_packed(documents) | {
        "lengths": torch.tensor([len(rollout.logprobs) for rollout in rollouts]),
        "sampled": torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs]),
    }


class RolloutStep(Whole):
    """The step that learns from rollouts. Its batch is a list of parts, each as Draws describes it; their gradients are
    added up.

    times: rollouts of a prompt. RolloutLog reads records, the newest step's rollouts with their rewards, [] if it
    learned once more from the same ones; seconds, of its parts; and most, the step's figures that are maxima.
    """

    objective: Draws

    def __init__(
        self,
        objective: Draws,
        settings: RolloutSettings,
        rewards: Rewards | None,
        teacher: nn.Module | None,
        times: int,
        plan: PromptPlan,
        episodes: EpisodeSampler | None = None,
    ) -> None:
        super().__init__(objective, teacher=teacher)
        self.settings, self.rewards, self.times, self.plan = settings, rewards, times, plan
        self.episodes = episodes
        self.ready: dict[int, dict[str, Any]] = {}  # batches by the number of their first prompt
        self.records: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []  # records of conversations that were dropped since the last step
        self.seconds = {"draw_s": 0.0, "judge_s": 0.0}
        self.most: dict[str, torch.Tensor] = {}

    def complete_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Batch:
        first = batch["samples"].original(batch["first"])
        # The first micro batch of a step samples for all of them: large batches draw faster.
        if first not in self.ready:
            self.ready = self.batches_of_step(model, batch["samples"], first, batch["tokens"].device)
        return self.ready[first]

    def batches_of_step(
        self, model: nn.Module, samples: PromptSamples, first: int, device: torch.device
    ) -> dict[int, dict[str, Any]]:
        """The batches of the step that begins with original sample `first`, by their first ones."""
        numbers = self.plan.numbers(first)
        rollouts, judged, self.seconds = self.judged_rollouts(model, samples, numbers, self.times)
        # NaN is no reward. A group's advantages leave it out.
        rewards = torch.tensor([math.nan if total is None else total for total in judged.total], dtype=torch.float64)
        advantages = self.objective.advantages(rewards.view(-1, self.times)).flatten() if len(rewards) else rewards
        self.records = self.faults + self.rollout_records(samples, numbers, rollouts, judged, advantages.tolist())
        # One failure is noted and the run goes on. If all fail, the class is broken and nothing could be learned.
        if all(rollout.fault for rollout in rollouts):
            raise UserError(f"--environment: each conversation of the step failed: {dropped(self.faults)}")
        rollouts, self.faults = stand_ins(rollouts, self.times), []
        # Over all ranks, so that a token weighs the same whichever rank has it.
        mean = over_ranks(self.counted(rollouts) / len(rollouts), device)
        rows = self.plan.micro_bsz * self.times
        # The same cuts on every rank: each part is a forward and a backward pass that ZeRO's ranks enter together.
        slices = part_slices(rows, self.times, self.objective.learned or rows)
        batches = {}
        for begin, start in zip(self.plan.firsts(first), range(0, len(rollouts), rows)):
            places = [slice(start + part.start, start + part.stop) for part in slices]
            parts = [self.batch_of(rollouts[at], self.times, advantages[at], mean, device) for at in places]
            batches[begin] = {"parts": parts}
        return batches

    def judged_rollouts(
        self, model: nn.Module, samples: PromptSamples, numbers: Sequence[int], times: int
    ) -> tuple[list[Rollout], Judged, dict[str, float]]:
        """Sample `times` rollouts of each of these samples -> (the rollouts, their rewards, the seconds of both)."""
        assert isinstance(model, LanguageModel)
        began = time.perf_counter()
        if self.episodes is None:
            prompts = {number: samples.prompt(number) for number in numbers}
            groups = sample_rollouts(model, self.settings, prompts, times)
        else:
            rows = {number: samples.row(number) for number in numbers}
            groups = sample_episodes(model, self.settings, self.episodes, rows, times)
        rollouts = [rollout for group in groups for rollout in group]
        sampled, judged = time.perf_counter(), Judged([], {})
        # The prompt of each rollout, in their order.
        owners = [number for number in numbers for _ in range(times)]
        sound = [place for place, rollout in enumerate(rollouts) if not rollout.fault]
        if self.rewards is not None and sound:
            texts = [self.settings.tokenizer.decode(rollouts[place].prompt) for place in sound]
            completions, states = ([getattr(rollouts[at], name) for at in sound] for name in ("text", "state"))
            scored = self.rewards.score(texts, completions, [samples.row(owners[at]) for at in sound], states)
            judged = scored.spread(sound, len(rollouts))
        if self.episodes is not None and self.episodes.environments.scoring:
            judged = with_scores(judged, [rollout.score for rollout in rollouts])
        self.faults += [
            {"sample": owner, "row": samples.place(owner), "fields": samples.row(owner), "fault": rollout.fault}
            for owner, rollout in zip(owners, rollouts)
            if rollout.fault
        ]
        return rollouts, judged, {"draw_s": sampled - began, "judge_s": time.perf_counter() - sampled}

    def counted(self, rollouts: Sequence[Rollout]) -> float:
        """The number of tokens of rollouts that count in the loss."""
        return sum(len(rollout.logprobs) * self.share(rollout) for rollout in rollouts)

    def share(self, rollout: Rollout) -> float:
        """The weight of a rollout in the loss."""
        return 0.0 if rollout.fault else self.objective.share(rollout.cut)

    def batch_of(
        self, rollouts: Sequence[Rollout], times: int, advantages: torch.Tensor, mean: float, device: torch.device
    ) -> dict[str, Any]:
        """The batch of rollouts, `times` of a prompt, as Draws describes it; advantages are (0,) without rewards."""
        batch = packed(rollouts)
        batch |= {"shares": torch.tensor([self.share(rollout) for rollout in rollouts])}
        batch |= {"advantages": advantages.float()} if len(advantages) else {}
        numbers = {"prompts": len(rollouts) / times, "limit": self.settings.longest, "mean_length": max(mean, 1.0)}
        batch |= {name: torch.tensor(float(number)) for name, number in numbers.items()}
        return to_device(batch | share_prefixes(batch, min(times, len(rollouts))), device)

    def loss(self, model: nn.Module, batch: Mapping[str, Any], count: float) -> torch.Tensor:
        parts = batch["parts"]
        if len(parts) == 1:
            return self.part_loss(model, parts[0], count)
        parameters = trainable(model)
        sums: list[torch.Tensor] = []
        losses, measures = [], []
        for part in parts:
            loss = self.part_loss(model, part, count)
            # autograd.grad and not backward: ZeRO's hooks may see each parameter's gradient once a micro batch.
            add_gradients(sums, torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
            losses.append(loss.detach())
            measures.append(self.measures)
        # Each part's loss is divided by the count of the whole step already: sums, and no means.
        self.measures = {name: torch.stack([each[name] for each in measures]).sum() for name in self.measures}
        return with_gradients(torch.stack(losses).sum(), sums, parameters)

    def part_loss(self, model: nn.Module, part: Batch, count: float) -> torch.Tensor:
        loss = super().loss(model, part, count)
        measures = dict(self.measures)
        # A maximum cannot be added up over micro batches and ranks as StepSums does, so RolloutLog takes it by itself.
        largest = {name: measures.pop(name) for name in LARGEST if name in measures}
        self.most = {name: value.maximum(self.most.get(name, value)) for name, value in largest.items()}
        self.measures = measures
        return loss

    @torch.no_grad()
    def total(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The sum over a validation batch's prompts, with a rollout of each, of the rewards, negated; without rewards,
        the rollouts' mean loss of a token, times the number of prompts."""
        samples, first, device = batch["samples"], batch["first"], batch["tokens"].device
        numbers = range(first, min(first + self.plan.micro_bsz, len(samples)))
        rollouts, judged = list[Rollout](), Judged([], {})
        if numbers:
            rollouts, judged, _ = self.judged_rollouts(model, samples, numbers, 1)
        if self.rewards is not None or self.episodes is not None:
            reward = torch.tensor(sum(total or 0.0 for total in judged.total), device=device)
            self.measures = {"reward": reward}
            return -reward
        if not rollouts:
            zero = torch.zeros((), device=device)
            self.measures = {figure.name: zero for figure in self.objective.figures}
            return zero
        most, mean = self.most, self.counted(rollouts) / len(rollouts)
        # part_loss notes the maxima of training; those of held-out prompts are not to be among them.
        loss = self.part_loss(model, self.batch_of(rollouts, 1, torch.zeros(0), mean, device), 1)
        self.most = most  # a step's
        return loss

    def items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        rows = min(self.plan.micro_bsz, max(0, len(batch["samples"]) - batch["first"]))
        return torch.tensor(float(rows), device=batch["tokens"].device)

    def rollout_records(
        self,
        samples: PromptSamples,
        numbers: Sequence[int],
        rollouts: Sequence[Rollout],
        judged: Judged,
        advantages: Sequence[float],
    ) -> list[dict[str, Any]]:
        """The records of rollouts without a fault, each with its sample, row and rewards (if there are any)."""
        owners = [number for number in numbers for _ in range(self.times)]
        records: list[dict[str, Any]] = []
        for place, (owner, rollout) in enumerate(zip(owners, rollouts)):
            if rollout.fault:
                continue
            record = {
                "sample": owner,
                "row": samples.place(owner),
                "prompt": self.settings.tokenizer.decode(rollout.prompt),
                "completion": rollout.text,
                "end": rollout.end,
                "length": len(rollout.logprobs),
                "entropy": math.fsum(rollout.entropies) / len(rollout.entropies),
            }
            record |= {"turns": rollout.turns} if rollout.turns else {}
            if judged.total:
                record["reward"] = judged.total[place]
                record["rewards"] = {name: values[place] for name, values in judged.each.items()}
                record["advantage"] = advantages[place]
            records.append(record)
        return records


def stand_ins(rollouts: Sequence[Rollout], times: int) -> list[Rollout]:
    """Rollouts, `times` of a prompt, with another of their prompt, if there is one, in place of those with a fault,
    or one of another prompt. Its tokens then weigh nothing: each group keeps its size. At least one has no fault."""
    # Shapes stay the same: advantages and parts are cut by `times` rollouts a prompt.
    anywhere = next(rollout for rollout in rollouts if not rollout.fault)
    result = list[Rollout]()
    for first in range(0, len(rollouts), times):
        group = rollouts[first : first + times]
        other = next((rollout for rollout in group if not rollout.fault), anywhere)
        result += [other._replace(fault=rollout.fault) if rollout.fault else rollout for rollout in group]
    return result


def with_scores(judged: Judged, scores: list[float | None]) -> Judged:
    """Add the scores of environments to a Judged, with weight 1."""
    if not judged.total:
        return Judged(scores, {SCORE: scores})
    total = [
        one if other is None else other if one is None else one + other for one, other in zip(judged.total, scores)
    ]
    return Judged(total, {**judged.each, SCORE: scores})


def part_slices(rows: int, times: int, most: int) -> list[slice]:
    """Cut `rows` rollouts, `times` of a prompt, into pieces of at most `most`: of whole groups, or each within one."""
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


class RolloutLog:
    """Called on all ranks after each step, as an Examiner is; rank 0 adds the step's rollouts to the file at `path`."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self.flat, self.noted = 0, set[str]()
        self.numbers: dict[str, float] = {}

    def __call__(self, engine: TrainingEngine, done: int, ending: bool) -> tuple[dict[str, float], list[str]]:
        """(numbers by name, lines of text to print) on rank 0; ({}, []) otherwise."""
        step = engine.compute
        assert isinstance(step, RolloutStep)  # because the run samples
        mine = step.records, {name: value.item() for name, value in step.most.items()}
        of_ranks: list[Any] = [mine]
        if engine.ranks > 1:
            of_ranks = [None] * engine.ranks
            dist.all_gather_object(of_ranks, mine)
        # On every rank, and at once: these must not be logged again by the next step.
        step.records, step.most = [], {}
        if engine.rank != 0:
            return {}, []
        parts, largest = zip(*of_ranks)
        most = {name: max(each[name] for each in largest) for name in largest[0]}
        if not parts[0]:  # learned once more from the same rollouts
            return self.numbers | most, []
        records = sorted((record for part in parts for record in part), key=lambda record: record["sample"])
        faults = [record for record in records if "fault" in record]
        sound = [record for record in records if "fault" not in record]
        place = {"step": done - 1, "samples": self.plan.samples_seen(done)}
        append_text(self.path, "".join(json.dumps(place | record, ensure_ascii=False) + "\n" for record in records))
        numbers = figures_of(sound)
        self.numbers = numbers | {"draw_s": 0.0, "judge_s": 0.0}
        notes = [f"note: {dropped(faults)}"] if faults else []
        return numbers | most | step.seconds, [*notes, *self.notes(numbers, [record["end"] for record in sound])]

    def notes(self, numbers: dict[str, float], ends: Sequence[str]) -> Iterator[str]:
        """Yield notes for a reader of the log, each kind of them once."""
        self.flat = self.flat + 1 if numbers.get("flat") == 1 else 0
        if self.flat == FLAT and "flat" not in self.noted:
            self.noted.add("flat")
            yield (
                f"for {FLAT} steps the answers to a prompt all earned the same ({numbers.get('reward', 0):g} on "
                "average), so that nothing is learned. If none is right, the task is too hard: teach a few answers "
                "first, by --data_type sft, or raise --num_generations. If all are right, stop here, or give harder "
                "prompts"
            )
        if numbers["cut"] > 0.5 and "cut" not in self.noted:
            self.noted.add("cut")
            flag = "--max_completion_length"
            if ends.count(TURN_CUT) > ends.count("length"):
                flag = "--turn_tokens"
            yield (
                f"more than half of the answers were cut at {flag}; raise it, or first teach the model how answers "
                "end, by --data_type sft"
            )


def dropped(faults: Sequence[Mapping[str, Any]]) -> str:
    """The message on conversations that were dropped, by the first one's record."""
    first, number = faults[0], len(faults)
    which = "" if number == 1 else f", the first of {number},"
    fields = " ".join(str(first["fields"]).split())[:QUOTED]
    return f"a conversation of row {first['row'] + 1}{which} was dropped: {first['fault']}; mend the class ({fields})"


def figures_of(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures of a step's rollouts: of rewards, if there are any; means of length and entropy; the share cut."""
    tokens = sum(record["length"] for record in records)
    figures = reward_figures(records) if "reward" in records[0] else {}
    figures["length"] = tokens / len(records)
    figures["cut"] = mean([float(record["end"] in CUT) for record in records])
    figures["entropy"] = math.fsum(record["entropy"] * record["length"] for record in records) / tokens
    return figures


def reward_figures(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The means of the reward, of each reward by itself and of a group's spread; the share of groups without spread."""
    groups: dict[int, list[float]] = {}
    for record in records:
        groups.setdefault(record["sample"], []).extend(known([record["reward"]]))
    figures = {"reward": mean(known(record["reward"] for record in records))}
    figures["reward_std"] = mean([stdev(group) for group in groups.values() if len(group) > 1])
    figures["flat"] = mean([float(len(set(group)) < 2) for group in groups.values()])
    for name in records[0]["rewards"]:
        figures[f"reward/{name}"] = mean(known(record["rewards"][name] for record in records))
    return figures


def known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
