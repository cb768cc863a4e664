"""Questions while training: the model answers them as it is, and its answers are scored and kept."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from ..config import TrainConfig
from .compiling import uncompiled
from .plan import Plan
from .watch import Watch

Answer = dict[str, Any]  # with the number of its question


class Exam(Protocol):
    """What a run is given to ask: evals/exam.py, evals/harness_exam.py and evals/rows_exam.py have one each."""

    def __len__(self) -> int: ...

    def ask(self, model: Any, rank: int, ranks: int) -> Iterator[Answer]: ...


class Judged(Exam, Protocol):
    """One whose answers are scored."""

    def judge(self, records: Sequence[Answer]) -> tuple[dict[str, float], Sequence[dict[str, Any]], list[str]]:
        """Numbers for the run's metrics by name, the lines of a file (JSON), and what is told."""


class Examiner:
    """Called on all ranks after each step; every eval_every steps (0: every epoch), and when the run ends, the model
    answers the exam, each rank a share of it, and rank 0 judges.

    What the answers come to is added to the file at `path`, each line with its step. `watch` (training/watch.py) hears
    of every answer.
    """

    def __init__(self, exam: Judged, path: Path, train: TrainConfig, plan: Plan, watch: Watch) -> None:
        self.exam, self.path, self.watch = exam, path, watch
        self.every, self.compile = train.eval_every or plan.epoch_steps, train.compile
        self.plan = plan

    def __call__(self, trainer: Any, lit: Any, done: int, ending: bool) -> tuple[dict[str, float], list[str]]:
        """(numbers by name, what is told of them) where this step asks and this is rank 0, else nothing of either."""
        if done % self.every and not ending:
            return {}, []
        records = answers_of(self.exam, self.watch, self.compile, trainer, lit, f"the questions after step {done}")
        if not trainer.is_global_zero:
            return {}, []
        self.watch.moved(f"the scores after step {done}")
        metrics, lines, words = self.exam.judge(records)
        place = {"step": lit.step, "samples": self.plan.samples_seen(done)}
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for line in lines:
                file.write(json.dumps(place | line, ensure_ascii=False) + "\n")
        return metrics, words


def answers_of(exam: Exam, watch: Watch, compiles: bool, trainer: Any, lit: Any, doing: str) -> list[Answer]:
    """The model's answers to an exam as it is, each rank a share of them, in order and on every rank; `doing` is what
    the watch hears of each."""
    records: list[Answer] = []
    lit.model.eval()
    with uncompiled(compiles):
        for record in exam.ask(lit.model, trainer.global_rank, trainer.world_size):
            watch.moved(doing)
            records.append(record)
    lit.model.train()
    if trainer.world_size > 1:
        parts: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(parts, records)
        records = [record for part in parts for record in part]
    return sorted(records, key=lambda record: record["number"])
