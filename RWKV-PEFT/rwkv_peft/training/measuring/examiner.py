"""Ask the model questions while it trains, score its answers and write them to a file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ...checkpoints.atomic import append_text
from ...config import TrainConfig
from ...evals.exam import Exam, RowsExam
from ..ranks.watch import Watch
from ..saving.partitions import averaged
from ..step.compiling import uncompiled
from ..step.plan import Plan

if TYPE_CHECKING:
    from ...evals.harness import HarnessExam

Answer = dict[str, Any]  # its "number" is that of the question


class Examiner:
    """Called on all ranks after each step; every eval_every steps (0: every epoch), and when the run ends, the model
    answers the exam, each rank a share of it, and rank 0 judges.

    Rank 0 adds the judgement's records to the file at `path`, with step and samples. `watch` (training/ranks/watch.py)
    hears of every answer.
    """

    def __init__(self, exam: "Exam | HarnessExam", path: Path, train: TrainConfig, plan: Plan, watch: Watch) -> None:
        self.exam, self.path, self.watch = exam, path, watch
        self.every, self.compile = train.eval_every or plan.epoch_steps, train.compile
        self.plan = plan

    def __call__(self, trainer: Any, lit: Any, done: int, ending: bool) -> tuple[dict[str, float], list[str]]:
        """Ask if it is due after this step -> (numbers by name, lines to print) on rank 0; else ({}, [])."""
        if done % self.every and not ending:
            return {}, []
        records = answers_of(self.exam, self.watch, self.compile, trainer, lit, f"the questions after step {done}")
        if not trainer.is_global_zero:
            return {}, []
        self.watch.moved(f"the scores after step {done}")
        metrics, lines, words = self.exam.judge(records)
        place = {"step": lit.step, "samples": self.plan.samples_seen(done)}
        append_text(self.path, "".join(json.dumps(place | line, ensure_ascii=False) + "\n" for line in lines))
        return metrics, words


def answers_of(
    exam: "Exam | RowsExam | HarnessExam", watch: Watch, compiles: bool, trainer: Any, lit: Any, doing: str
) -> list[Answer]:
    """Have the model answer an exam, each rank a share of it -> all answers, on every rank, in the order of the
    questions. compiles: the run compiles blocks; doing: what the watch hears of each answer."""
    records: list[Answer] = []
    lit.model.eval()
    with averaged(trainer.optimizers[0]), uncompiled(compiles):
        for record in exam.ask(lit.model, trainer.global_rank, trainer.world_size):
            watch.moved(doing)
            records.append(record)
    lit.model.train()
    if trainer.world_size > 1:
        parts: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(parts, records)
        records = [record for part in parts for record in part]
    return sorted(records, key=lambda record: record["number"])
