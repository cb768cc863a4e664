"""The flags of the questions that a model answers while it trains (--eval_data), judged together."""

from dataclasses import fields

from ..config import TrainConfig
from ..errors import UserError
from ..names import WRITTEN


def check_questions(train: TrainConfig) -> None:
    """Contradictions among the flags of the questions that are put while training."""
    if not train.eval_data:
        for field in fields(TrainConfig):
            if field.name.startswith("eval_") and getattr(train, field.name) != field.default:
                raise UserError(
                    f"--{field.name} is about questions, and there are none; name their file with --eval_data"
                )
        return
    if train.stage == 3:
        raise UserError(
            f"--eval_data and --strategy {train.strategy}: each rank holds a part of every layer and could not answer "
            "by itself; take stage 1 or 2, or ask what the run has saved with rwkv-peft eval"
        )
    for name, default in (("eval_max_tokens", TrainConfig.eval_max_tokens), ("eval_stop", ())):
        if getattr(train, name) != default and train.eval_task not in WRITTEN:
            raise UserError(
                f"--{name} bounds an answer that is written, and {train.eval_task} writes none; leave it out"
            )
    if "" in train.eval_stop:
        raise UserError("--eval_stop: an empty text would stop before the first token; leave it out")
