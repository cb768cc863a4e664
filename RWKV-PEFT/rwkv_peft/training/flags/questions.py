"""Check the flags of the questions that a model answers while it trains (--eval_data, --lm_eval)."""

import importlib.util
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from ...config import TrainConfig
from ...names import WRITTEN

SHARED = ("eval_every", "eval_limit", "eval_batch")  # by --eval_data and --lm_eval


def check_questions(train: TrainConfig) -> Iterator[str]:
    """Yield the contradictions among the flags of the questions."""
    for field in fields(TrainConfig):
        if getattr(train, field.name) != field.default:
            yield from check_asked(train, field.name)
    if train.stage == 3 and (train.eval_data or train.lm_eval):
        flag = "--eval_data" if train.eval_data else "--lm_eval"
        yield (
            f"{flag} and --strategy {train.strategy}: each rank holds a part of every layer and could not answer "
            f"by itself; take stage 1 or 2, or ask what the run has saved with rwkv-peft eval"
        )
    if train.eval_data:
        yield from check_answers(train)
    if train.lm_eval:
        yield from check_harness(train)


def check_asked(train: TrainConfig, name: str) -> Iterator[str]:
    """Refuse a given flag that is about questions if there are none of its kind."""
    if name in SHARED and not (train.eval_data or train.lm_eval):
        yield (
            f"--{name} is about questions, and there are none; name their file with --eval_data, or tasks with "
            "--lm_eval"
        )
    if name.startswith("eval_") and name not in SHARED and not train.eval_data:
        yield f"--{name} is about questions of a file, and there is none; name it with --eval_data"
    if name.startswith("lm_eval_") and not train.lm_eval:
        yield f"--{name} is about tasks of lm_eval, and there are none; name them with --lm_eval"


def check_answers(train: TrainConfig) -> Iterator[str]:
    """Refuse flags that do not fit the task of --eval_data."""
    for name, default in (("eval_max_tokens", TrainConfig.eval_max_tokens), ("eval_stop", ())):
        if getattr(train, name) != default and train.eval_task not in WRITTEN:
            yield (f"--{name} bounds an answer that is written, and {train.eval_task} writes none; leave it out")
    if "" in train.eval_stop:
        yield "--eval_stop: an empty text would stop before the first token; leave it out"


def check_harness(train: TrainConfig) -> Iterator[str]:
    """Refuse --lm_eval if --lm_eval_include_path is no folder, or if the package lm_eval is not installed."""
    folder = train.lm_eval_include_path
    if folder and not Path(folder).is_dir():
        yield f"--lm_eval_include_path {folder} is no folder; name the one that the tasks' .yaml lie in"
    if importlib.util.find_spec("lm_eval") is None:
        yield (f"--lm_eval {' '.join(train.lm_eval)} needs the package lm_eval; pip install -r requirements-eval.txt")
