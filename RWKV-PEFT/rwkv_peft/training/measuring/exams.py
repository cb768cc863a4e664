"""Find what a run asks its model: questions that flags name, and rows of its data before and after."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...cli.errors import UserError
from ...cli.parser import counted
from ...config import RunConfig
from ...data.recorded import find_tokenizer
from ...data.samples import Samples
from ...data.tokenizer import KNOWN_SIZES
from ...evals.exam import Exam, RowsExam, rows_of
from ...inference.flags import unescaped
from ..inputs import VALIDATION, Inputs
from ..saving.checkpoints import ANSWERS, LM_EVAL
from .before_after import Questions

if TYPE_CHECKING:
    from ...evals.harness import HarnessExam

TRAINING, HELD_OUT = "training", "held-out"
BATCH = 8  # rows that are answered at once


def find_questions(inputs: Inputs, speaks: bool) -> Questions:
    """Find the Questions of a run; notes on them join those on its samples. Raises UserError as find_exams does."""
    exams = find_exams(inputs.config, inputs.samples, speaks)
    rows, note = find_rows(inputs.config, inputs.samples, inputs.measured)
    inputs.samples.notes += filter(None, [note])
    return Questions(exams, rows)


def find_exams(config: RunConfig, samples: Samples, speaks: bool = True) -> "dict[str, Exam | HarnessExam]":
    """Make the exams that --eval_data and --lm_eval ask for, in the tokens of the data -> {file of their results:
    exam}; notes on them join samples.notes. A process that `speaks` shows lm_eval's progress bars. Raises UserError if
    nothing tells the data's tokenizer, and as the exams do."""
    train, vocab_size = config.train, config.model.vocab_size
    if not train.eval_data and not train.lm_eval:
        return {}
    if samples.vocabulary is None and vocab_size not in dict(KNOWN_SIZES):
        given = f"--eval_data {train.eval_data}" if train.eval_data else f"--lm_eval {' '.join(train.lm_eval)}"
        raise UserError(
            f"{given}: no record beside {config.data.path} names its tokenizer, and no known tokenizer has "
            f"{vocab_size} tokens; make the data with rwkv-peft preprocess, which records it"
        )
    tokenizer = find_tokenizer(None, vocab_size, samples.vocabulary)
    exams: dict[str, Exam | HarnessExam] = {}
    if train.eval_data:
        exams[ANSWERS] = Exam(train, tokenizer, config.data.clean_turns)
    if train.lm_eval:
        from ...evals import harness  # only now, because lm_eval takes seconds to import

        exams[LM_EVAL] = harness.HarnessExam(train, tokenizer, speaks)
    sources = {ANSWERS: train.eval_data, LM_EVAL: f"lm_eval {' '.join(train.lm_eval)}"}
    often = f"every {counted(train.eval_every, 'step')}" if train.eval_every else "every epoch"
    for name, exam in exams.items():
        samples.notes.append(f"{counted(len(exam), 'question')} of {sources[name]}, asked {often} and at the end")
    return exams


def find_rows(config: RunConfig, samples: Samples, measured: Mapping[str, Samples]) -> tuple[RowsExam | None, str]:
    """Choose the rows to answer -> (their exam, a note); (None, why not), with "" if none are asked for."""
    train, number = config.train, config.train.answer_rows
    if not number:
        return None, ""
    if train.stage == 3:
        return None, f"no rows are answered before and after: with {train.strategy} no rank has a whole model"
    try:
        tokenizer = find_tokenizer(None, config.model.vocab_size, samples.vocabulary)
        of = {TRAINING: samples} | ({HELD_OUT: measured[VALIDATION]} if VALIDATION in measured else {})
        found = {name: rows_of(name, data, number) for name, data in of.items()}
        stops = list(map(unescaped, train.eval_stop))
        exam = RowsExam([row for rows in found.values() for row in rows], tokenizer, BATCH, stops)
    except UserError as error:
        return None, f"no rows are answered before and after training: {error}"
    numbers = " and ".join(counted(len(rows), f"{name} row") for name, rows in found.items())
    held_out = "" if HELD_OUT in of else "; --val_split 0.1 would hold some out"
    return exam, f"{numbers} are answered before and after training (--answer_rows){held_out}"
