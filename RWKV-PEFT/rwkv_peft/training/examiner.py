"""Questions while training: the model answers them as it is, and its answers are scored and kept."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..config import TrainConfig
from .checkpoints import ANSWERS
from .plan import Plan
from .watch import Watch


class Exam(Protocol):
    """What a run is given to ask; evals/exam.py has one."""

    def __len__(self) -> int: ...

    def ask(self, model: Any, rank: int, ranks: int) -> Iterator[dict[str, Any]]: ...

    def shares(self, records: Sequence[dict[str, Any]]) -> dict[str, float]: ...


class Examiner:
    """Called on all ranks after each step; every eval_every steps (0: every epoch), and when the run ends, the model
    answers the exam, each rank a share of it.

    The answers are added to answers.jsonl in the run's folder, a line each with its step. `watch` (training/watch.py)
    hears of every answer.
    """

    def __init__(self, exam: Exam, train: TrainConfig, plan: Plan, folder: Path, watch: Watch) -> None:
        self.exam, self.path, self.watch = exam, folder / ANSWERS, watch
        self.every, self.compiled = train.eval_every or plan.epoch_steps, train.compile

    def __call__(self, trainer: Any, lit: Any, done: int, ending: bool) -> dict[str, float]:
        """{"eval_score": the share right by the exam's first measure, "eval_" and the name of each other: its share}
        where this step asks, else {}."""
        if done % self.every and not ending:
            return {}
        records = self.answers(trainer, lit)
        if trainer.is_global_zero:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                for record in records:
                    file.write(json.dumps({"step": lit.step} | record, ensure_ascii=False) + "\n")
        (first, share), *others = self.exam.shares(records).items()
        return {"eval_score": share} | {f"eval_{name.replace(' ', '_')}": other for name, other in others}

    def answers(self, trainer: Any, lit: Any) -> list[dict[str, Any]]:
        """The records of all problems in order, on every rank."""
        records: list[dict[str, Any]] = []
        # answers have shapes of all kinds, each of which would be compiled
        plain = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        lit.model.eval()
        with plain:
            for record in self.exam.ask(lit.model, trainer.global_rank, trainer.world_size):
                self.watch.moved(f"the questions after step {lit.step}")
                records.append(record)
        lit.model.train()
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, records)
            records = [record for part in parts for record in part]
        return sorted(records, key=lambda record: record["number"])
