"""Writes down the answers that steps draw, and what they earned, and tells of rewards from which nothing is learned."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch.distributed as dist

from ...checkpoints.atomic import append_text
from ..step.plan import Plan
from .drawn import Drawing

LONG = 10  # steps in a row without spread, after which a run says so


class AnswersLog:
    """Called on all ranks after each step, as an Examiner is; rank 0 adds the step's answers to the file at `path`."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self.flat, self.told = 0, set[str]()
        self.numbers: dict[str, float] = {}

    def __call__(self, trainer: Any, lit: Any, done: int, ending: bool) -> tuple[dict[str, float], list[str]]:
        """Return (numbers by name, lines of text to print) on rank 0; ({}, []) otherwise."""
        step: Drawing = lit.compute
        found: list[Any] = [(step.records, {name: value.item() for name, value in step.most.items()})]
        if trainer.world_size > 1:
            own, found = found[0], [None] * trainer.world_size
            dist.all_gather_object(found, own)
        step.records, step.most = [], {}
        if not trainer.is_global_zero:
            return {}, []
        parts, largest = zip(*found)
        most = {name: max(each[name] for each in largest) for name in largest[0]}
        if not parts[0]:  # learned once more from the same answers
            return self.numbers | most, []
        records = sorted((record for part in parts for record in part), key=lambda record: record["sample"])
        place = {"step": lit.step, "samples": self.plan.samples_seen(done)}
        append_text(self.path, "".join(json.dumps(place | record, ensure_ascii=False) + "\n" for record in records))
        numbers = summary(records)
        self.numbers = numbers | {"draw_s": 0.0, "judge_s": 0.0}
        return numbers | most | step.seconds, list(self.remarks(records, numbers))

    def remarks(self, records: Sequence[dict[str, Any]], numbers: dict[str, float]) -> Iterator[str]:
        """Yield what a reader of the log should know, each kind of it once."""
        self.flat = self.flat + 1 if numbers.get("flat") == 1 else 0
        empty = next((record["row"] for record in records if not record["completion"].strip()), None)
        for kind, holds, words in (
            (
                "flat",
                self.flat == LONG,
                f"for {LONG} steps the answers to a prompt all earned the same ({numbers.get('reward', 0):g} on "
                "average), so that nothing is learned. If none is right, the task is too hard: teach a few answers "
                "first, by --data_type sft, or raise --num_generations. If all are right, stop here, or give harder "
                "prompts",
            ),
            (
                "cut",
                numbers["cut"] > 0.5,
                "more than half of the answers were cut at --max_completion_length; raise it, or first teach the model "
                "how answers end, by --data_type sft",
            ),
            (
                "empty",
                empty is not None,
                f"an answer to row {empty} is empty (rows count from 0); it is judged as it is",
            ),
        ):
            if holds and kind not in self.told:
                self.told.add(kind)
                yield words


def rewards_of(records: Iterable[dict[str, Any]]) -> list[float]:
    return [record["reward"] for record in records if record["reward"] is not None]


def summary(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The numbers of a step's answers: of their rewards, if judged; means of tokens and entropy; the share cut."""
    found = rewarded(records) if "reward" in records[0] else {}
    tokens = sum(record["length"] for record in records)
    found["length"] = tokens / len(records)
    found["cut"] = mean([float(record["end"] == "length") for record in records])
    found["entropy"] = math.fsum(record["entropy"] * record["length"] for record in records) / tokens
    return found


def rewarded(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of reward and of each reward by itself, and of a group's spread; the share of groups without any."""
    groups: dict[int, list[float]] = {}
    for record in records:
        groups.setdefault(record["sample"], []).extend(rewards_of([record]))
    found = {"reward": mean(rewards_of(records))}
    found["reward_std"] = mean([stdev(group) for group in groups.values() if len(group) > 1])
    found["flat"] = mean([float(len(set(group)) < 2) for group in groups.values()])
    for name in records[0]["rewards"]:
        values = [record["rewards"][name] for record in records]
        found[f"reward/{name}"] = mean([value for value in values if value is not None])
    return found


def mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
