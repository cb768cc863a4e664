"""Measurements while training: losses of held-out samples and of data to retain; the exam of --eval_data, every few
steps; and rows of the run's own data, answered before the first step and after the last one."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..checkpoints.atomic import append_text
from ..checkpoints.best import BEST
from ..cli.errors import UserError, in_line
from ..cli.parser import counted
from ..config import RunConfig, TrainConfig
from ..data.batches import EvalBatches
from ..data.mixture import Several
from ..data.recorded import chat_of, find_tokenizer
from ..data.samples import Samples
from ..data.tokenizer import KNOWN_SIZES
from ..evals.questions import OF, Exam, Record, RowsExam, rows_of
from ..inference.flags import unescaped
from .engine import TrainingEngine
from .inputs import VALIDATION, Inputs
from .saving.resume import write_records
from .saving.saver import Saver
from .step.compiling import uncompiled
from .step.plan import Plan
from .step.steps import Step

TRAINING, HELD_OUT = "training", "held-out"
BATCH = 8  # rows that are answered at once
SHOWN, WIDTH = 2, 100  # rows of each kind that are printed, and characters of a line
NEVER = "not known"  # shown for the answers before training if rows.jsonl is gone


class Validator:
    """Goes once through the samples of each data set, VALIDATION and RETAINED, every val_every steps (0: every epoch)
    and after the last one. All ranks call it after each step.

    A new lowest loss of VALIDATION saves the trained tensors under the label BEST. After early_stop validations in a
    row without one (0: never) `exhausted` is true.
    """

    def __init__(self, inputs: Inputs, saver: Saver | None) -> None:
        self.measured, self.plan, self.lowest, self.anew = inputs.measured, inputs.plan, inputs.lowest, not inputs.state
        self.saver, self.train = saver, inputs.config.train
        self.micro_bsz = inputs.config.data.micro_bsz
        self.every = self.train.val_every or inputs.plan.epoch_steps

    @property
    def exhausted(self) -> bool:
        return self.lowest.exhausts(self.train.early_stop)

    def before(self, engine: TrainingEngine) -> dict[str, float]:
        """The losses before a run's first step, {"val_start", "retain_start"}; {} if it is resumed."""
        # A run that resumes has these in its first record already.
        if not self.anew:
            return {}
        sums = {name: [self.sums(part, engine) for part in samples.parts] for name, samples in self.measured.items()}
        return {f"{name}_start": means([sum(each) for each in zip(*parts)])[0] for name, parts in sums.items()}

    def __call__(self, engine: TrainingEngine, done: int) -> dict[str, float]:
        """{"val_loss"}, with the step's other measures or else the perplexity "val_ppl", and the same of RETAINED as
        "retain_…"; of several data sets also "val_loss/NAME". {} if this step does not validate."""
        if done % self.every and done != self.plan.total_steps:
            return {}
        numbers: dict[str, float] = {}
        for name, samples in self.measured.items():
            sums = [self.sums(part, engine) for part in samples.parts]
            loss, *others = means([sum(each) for each in zip(*sums)])
            # 700: exp overflows float64 a little above it. The loss of a run that diverges is shown, and no error.
            measures = dict(zip(engine.compute.measures, others)) or {"ppl": math.exp(min(loss, 700.0))}
            numbers |= {f"{name}_loss": loss, **{f"{name}_{word}": value for word, value in measures.items()}}
            if isinstance(samples, Several):
                numbers |= {f"{name}_loss/{of}": means(each)[0] for of, each in zip(samples.sources, sums)}
        if VALIDATION in self.measured and self.lowest.note(numbers[f"{VALIDATION}_loss"]) and self.saver is not None:
            self.saver.save_tensors(engine, [BEST])
        return numbers

    def sums(self, samples: Samples, engine: TrainingEngine) -> list[float]:
        """[the items that count, sums over them of the loss and of the step's other measures], over all ranks."""
        # Ranks that share rows are one group and read the same ones.
        group = engine.rank // self.train.context_parallel
        batches = EvalBatches(samples, self.micro_bsz, group, self.train.groups)
        with uncompiled(self.train.compile):
            total = sums_over(batches, engine.compute, engine.model, engine.device)
        if engine.ranks > 1:
            dist.all_reduce(total)
        return total.tolist()


@torch.no_grad()
def sums_over(batches: EvalBatches, step: Step, model: nn.Module, device: torch.device) -> torch.Tensor:
    """[the items that count, sums over them of the loss and of the step's other measures] of batches, float64."""
    # In float64, because float32 would lose digits of a sum over many batches.
    sums: list[torch.Tensor] = []
    model.eval()
    for batch in batches:
        batch = step.prepare_inputs(batch, device)
        loss = step.total(model, batch)
        numbers = (step.items(batch), loss, *step.measures.values())
        sums.append(torch.stack([number.double() for number in numbers]))
    model.train()
    return torch.stack(sums).sum(0)


def means(sums: Sequence[float]) -> list[float]:
    """[items, sum, …] -> [mean, …]."""
    items, *others = sums
    return [other / (items or 1.0) for other in others]


class Questions(NamedTuple):
    """The questions of a run: the exam of --eval_data and the rows to answer, each None if there are none."""

    exam: Exam | None
    rows: RowsExam | None


def find_questions(inputs: Inputs) -> Questions:
    """The Questions of a run; notes on them join those on its samples. Raises UserError as find_exam does."""
    exam = find_exam(inputs.config, inputs.samples)
    rows, note = find_rows(inputs.config, inputs.samples, inputs.measured)
    inputs.samples.notes += filter(None, [note])
    return Questions(exam, rows)


def find_exam(config: RunConfig, samples: Samples) -> Exam | None:
    """The Exam of --eval_data, if given, in the tokens of the data; a note on it joins samples.notes. Raises UserError
    if the data's tokenizer is unknown; also as Exam does."""
    train, vocab_size = config.train, config.model.vocab_size
    if not train.eval_data:
        return None
    if samples.vocabulary is None and vocab_size not in dict(KNOWN_SIZES):
        raise UserError(
            f"--eval_data {train.eval_data}: no record beside {config.data.path} names its tokenizer, and no known "
            f"tokenizer has {vocab_size} tokens; make the data with rwkv-peft preprocess, which records it"
        )
    exam = Exam(train, find_tokenizer(None, vocab_size, samples.vocabulary), chat_of(vars(config.data)))
    often = f"every {counted(train.eval_every, 'step')}" if train.eval_every else "every epoch"
    samples.notes.append(f"{counted(len(exam), 'question')} of {train.eval_data}, asked {often} and at the end")
    return exam


def find_rows(config: RunConfig, samples: Samples, measured: Mapping[str, Samples]) -> tuple[RowsExam | None, str]:
    """The exam of rows to answer, with a note; or None, with the reason, "" if --answer_rows is 0."""
    train, number = config.train, config.train.answer_rows
    if not number:
        return None, ""
    if train.stage == 3:
        return None, f"no rows are answered before and after: with {train.strategy} no rank has a whole model"
    try:
        tokenizer = find_tokenizer(None, config.model.vocab_size, samples.vocabulary)
        of = {TRAINING: samples} | ({HELD_OUT: measured[VALIDATION]} if VALIDATION in measured else {})
        rows_by_source = {name: rows_of(name, data, number) for name, data in of.items()}
        stops = list(map(unescaped, train.eval_stop))
        exam = RowsExam([row for rows in rows_by_source.values() for row in rows], tokenizer, BATCH, stops)
    except UserError as error:
        return None, f"no rows are answered before and after training: {error}"
    numbers = " and ".join(counted(len(rows), f"{name} row") for name, rows in rows_by_source.items())
    held_out = "" if HELD_OUT in of else "; --val_split 0.1 would hold some out"
    return exam, f"{numbers} are answered before and after training (--answer_rows){held_out}"


def answers_of(
    exam: Exam | RowsExam,
    compiles: bool,
    engine: TrainingEngine,
    show: Callable[[Record], object] = lambda record: None,
) -> list[Record]:
    """The Records of an exam on every rank, in the order of their numbers; each rank answers a share of it. compiles:
    the run compiles blocks. show: gets each Record of the rank's share as it is done."""
    engine.model.eval()
    records: list[Record] = []
    with uncompiled(compiles):
        for record in exam.ask(engine.model, engine.rank, engine.ranks):
            records.append(record)
            show(record)
    engine.model.train()
    if engine.ranks > 1:
        parts: list[Any] = [None] * engine.ranks
        dist.all_gather_object(parts, records)
        records = [record for part in parts for record in part]
    return sorted(records, key=lambda record: record["number"])


class Examiner:
    """Called on all ranks after each step. Every eval_every steps (0: every epoch) and when the run ends, the model
    answers the exam. Rank 0 adds the judgement's records to the file at `path`, with step and samples."""

    def __init__(self, exam: Exam, path: Path, train: TrainConfig, plan: Plan) -> None:
        self.exam, self.path, self.plan = exam, path, plan
        self.every, self.compile = train.eval_every or plan.epoch_steps, train.compile

    def __call__(self, engine: TrainingEngine, done: int, ending: bool) -> tuple[dict[str, float], list[str]]:
        """(numbers by name, lines to print) on rank 0 if the exam is due after this step; else ({}, [])."""
        # By numbers that all ranks share: each answers a part, and they wait for each other.
        if done % self.every and not ending:
            return {}, []
        records = answers_of(self.exam, self.compile, engine)
        if engine.rank != 0:
            return {}, []
        metrics, lines, words = self.exam.score(records)
        place = {"step": done - 1, "samples": self.plan.samples_seen(done)}
        append_text(self.path, "".join(json.dumps(place | line, ensure_ascii=False) + "\n" for line in lines))
        return metrics, words


class BeforeAfter:
    """Answers the rows of a RowsExam, on all ranks: before() ahead of the first step, after() when the last one is
    done.

    Rank 0 writes the answers to `path`, a row a line, each as it comes: the file also shows how far they are. A resumed
    run (`anew` is false) does not answer before its first step: it reads the run's first answers there.
    """

    def __init__(self, exam: RowsExam, path: Path, compiles: bool, anew: bool) -> None:
        self.exam, self.path, self.compiles, self.anew = exam, path, compiles, anew
        self.records: list[dict[str, Any]] = []

    def before(self, engine: TrainingEngine) -> None:
        # Rows and prompts are written before the first answer is there: the page shows how far they are.
        answers: Sequence[Record | None] = [None] * len(self.exam) if self.anew else read_before(self.path, self.exam)
        self.records = [
            {
                "rows": self.exam.digest,
                "of": self.exam.rows[number].of,
                "prompt": self.exam.prompts[number],
                "answer": self.exam.answer(number),
                "before": answer and {name: answer[name] for name in ("text", "end")},
            }
            for number, answer in enumerate(answers)
        ]
        self.write(engine)
        if self.anew:
            self.answer("before", engine)

    def after(self, engine: TrainingEngine) -> None:
        self.answer("after", engine)

    def answer(self, when: str, engine: TrainingEngine) -> None:
        """Answer the rows; write each answer as `when` of its record."""

        def put(answer: Record) -> None:
            self.records[answer["number"]][when] = {name: answer[name] for name in ("text", "end")}

        def show(answer: Record) -> None:
            put(answer)
            self.write(engine)

        for answer in answers_of(self.exam, self.compiles, engine, show):
            put(answer)  # those of the other ranks, too
        self.write(engine)

    def write(self, engine: TrainingEngine) -> None:
        if engine.rank == 0:
            write_records(self.path, self.records)

    @property
    def changed(self) -> bool | None:
        """True if an answer differs from the one before training; None if those are lost."""
        pairs = [(record["before"], record.get("after")) for record in self.records]
        if not pairs or not all(before and after for before, after in pairs):
            return None
        return any(before != after for before, after in pairs)

    def lines(self) -> Iterator[str]:
        """Yield the lines to print at the end of a run; none if it ended before the last step."""
        done = [record for record in self.records if "after" in record]
        for name in dict.fromkeys(record["of"] for record in done):
            mine = [record for record in done if record["of"] == name]
            data, of, source = name.partition(OF)
            yield f"{counted(len(mine), f'{data} row')}{of}{source}: {agreement(mine)}"
            for record in mine[:SHOWN]:
                prompt, before = in_line(record["prompt"].strip()), record["before"]
                yield f"  prompt  {prompt if len(prompt) <= WIDTH else '…' + prompt[-WIDTH:]}"
                yield f"  row     {quoted(record['answer'])}"
                yield f"  before  {quoted(before) if before else NEVER}"
                yield f"  after   {quoted(record['after'])}"


def read_before(path: Path, exam: RowsExam) -> Sequence[Record | None]:
    """The answers before training in a run's file; None for each row if the file is gone or has other rows."""
    records = []
    if path.exists():
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    # By a digest of the rows: other data, or another number of rows, has other questions.
    if [record.get("rows") for record in records] != [exam.digest] * len(exam):
        return [None] * len(exam)
    return [record["before"] for record in records]


def agreement(records: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of answers that are the rows' own and of those that stop as they do, after training and before."""
    words = []
    for some, agrees, what, then in (
        (records, same, "answered word for word", "before training"),
        ([record for record in records if ends(record["answer"])], end_alike, "stop as the row does", "before"),
    ):
        before = [agrees(record["before"], record["answer"]) for record in some if record["before"]]
        after = sum(agrees(record["after"], record["answer"]) for record in some)
        words += [f"{after} {what} ({sum(before) if before else NEVER} {then})"] * bool(some)
    return ", ".join(words)


def unended(records: Iterable[Mapping[str, Any]]) -> bool:
    """True if some rows' answers end within LONGEST and none of the answers after training stops as its row's does."""
    done = [record for record in records if "after" in record and ends(record["answer"])]
    return bool(done) and not any(end_alike(record["after"], record["answer"]) for record in done)


def ends(answer: Mapping[str, str]) -> bool:
    """True if an answer ends within LONGEST tokens, with the document or at the next turn."""
    return answer["end"] != "length"


def same(answer: Mapping[str, str], expected: Mapping[str, str]) -> bool:
    """True if two answers have the same words and both stop, or both go on."""
    return answer["text"].strip() == expected["text"].strip() and end_alike(answer, expected)


def end_alike(answer: Mapping[str, str], expected: Mapping[str, str]) -> bool:
    """True if two answers both stop, or are both cut off at the limit."""
    return ends(answer) == ends(expected)


def quoted(answer: Mapping[str, str]) -> str:
    """An answer in one line, WIDTH characters of it at most; … follows if there are more, or if it was cut off."""
    line = in_line(answer["text"].strip())
    return line if len(line) <= WIDTH and ends(answer) else f"{line[:WIDTH]}…"
