"""Answer a few rows of a run's data before its first step and after its last one, to show whether it learned."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...cli.errors import UNREADABLE, in_line
from ...cli.parser import counted
from ...evals.exam import LONGEST, Exam, RowsExam
from ..ranks.watch import Watch
from ..saving.history import write_records
from .examiner import Answer, answers_of

if TYPE_CHECKING:
    from ...evals.harness import HarnessExam

SHOWN, WIDTH = 2, 100  # rows of each kind that are printed, and characters of a line
NEVER = "not known"  # shown for the answers before training if rows.jsonl is gone or damaged


class Questions(NamedTuple):
    """The questions of a run to its model: exams by the file of their results, and the rows to answer, if any."""

    exams: Mapping[str, "Exam | HarnessExam"]
    rows: RowsExam | None


class BeforeAfter:
    """Answers the rows, on all ranks: before() ahead of the first step, after() when the last one is done.

    Rank 0 writes the answers to `path`, a row a line. A run that goes on (`anew` is false) does not answer before its
    first step: it reads there what the run answered when it began.
    """

    def __init__(self, exam: RowsExam, path: Path, watch: Watch, compiles: bool, anew: bool) -> None:
        self.exam, self.path, self.anew = exam, path, anew
        self.ask = partial(answers_of, exam, watch, compiles)
        self.records: list[dict[str, Any]] = []

    def before(self, trainer: Any, lit: Any) -> None:
        answers: Sequence[Answer | None]
        answers = self.ask(trainer, lit, "the rows before training") if self.anew else read_before(self.path, self.exam)
        self.records = [
            {
                "rows": self.exam.digest,
                "of": self.exam.kinds[number],
                "prompt": self.exam.prompts[number],
                "answer": self.exam.answer(number),
                "before": answer and {name: answer[name] for name in ("text", "end")},
            }
            for number, answer in enumerate(answers)
        ]
        self.write(trainer)

    def after(self, trainer: Any, lit: Any) -> None:
        for record, answer in zip(self.records, self.ask(trainer, lit, "the rows after training")):
            record["after"] = {name: answer[name] for name in ("text", "end")}
        self.write(trainer)

    def write(self, trainer: Any) -> None:
        if trainer.is_global_zero:
            write_records(self.path, self.records)

    @property
    def changed(self) -> bool | None:
        """True if an answer differs from the one before training; None if that is not known."""
        pairs = [(record["before"], record.get("after")) for record in self.records]
        if not pairs or not all(before and after for before, after in pairs):
            return None
        return any(before != after for before, after in pairs)

    @property
    def known(self) -> bool:
        """True if every row was answered word for word before training."""
        answers = [(record["before"], record["answer"]) for record in self.records]
        return bool(answers) and all(given and same(given, due) for given, due in answers)

    def lines(self) -> Iterator[str]:
        """Yield the lines to print at the end of a run; none if it ended before the last step."""
        done = [record for record in self.records if "after" in record]
        kinds = dict.fromkeys(record["of"] for record in done)
        for name in kinds:
            mine = [record for record in done if record["of"] == name]
            data, of, source = name.partition(" of ")
            yield f"{counted(len(mine), f'{data} row')}{of}{source}: {agreement(mine)}"
            for record in mine[:SHOWN]:
                prompt, before = in_line(record["prompt"].strip()), record["before"]
                yield f"  prompt  {prompt if len(prompt) <= WIDTH else '…' + prompt[-WIDTH:]}"
                yield f"  row     {quoted(record['answer'])}"
                yield f"  before  {quoted(before) if before else NEVER}"
                yield f"  after   {quoted(record['after'])}"


def read_before(path: Path, exam: RowsExam) -> Sequence[Answer | None]:
    """Read the answers before training from a run's file; None for each row if it is gone, damaged or of others."""
    unknown = [None] * len(exam)
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        answers = [record["before"] for record in records if record["rows"] == exam.digest]
        texts = [(answer["text"], answer["end"]) for answer in answers if answer is not None]
    except UNREADABLE:
        return unknown
    whole = all(isinstance(word, str) for pair in texts for word in pair)
    return answers if whole and len(answers) == len(records) == len(exam) else unknown


def agreement(records: Sequence[Mapping[str, Any]]) -> str:
    """Say how many answers are the rows' own, and how many stop as the rows do, after training and before."""
    whole, words = [record for record in records if ends(record["answer"])], list[str]()
    for some, agrees, what, then in (
        (records, same, "answered word for word", "before training"),
        (whole, end_alike, "stop as the row does", "before"),
    ):
        before = [agrees(record["before"], record["answer"]) for record in some if record["before"]]
        after = sum(agrees(record["after"], record["answer"]) for record in some)
        words += [f"{after} {what} ({sum(before) if before else NEVER} {then})"] * bool(some)
    if longer := len(records) - len(whole):
        words.append(f"{longer} {'is' if longer == 1 else 'are'} longer than the {LONGEST} tokens that are compared")
    return ", ".join(words)


def unended(records: Iterable[Mapping[str, Any]]) -> bool:
    """Tell whether none of the answers after training stops as its row's does, if some of these end within LONGEST."""
    done = [record for record in records if "after" in record and ends(record["answer"])]
    return bool(done) and not any(end_alike(record["after"], record["answer"]) for record in done)


def ends(answer: Mapping[str, str]) -> bool:
    """Tell whether an answer ends within LONGEST tokens, and was not cut off there."""
    return answer["end"] != "length"


def same(given: Mapping[str, str], due: Mapping[str, str]) -> bool:
    """Tell whether two answers have the same words and both stop, or both go on."""
    return given["text"].strip() == due["text"].strip() and end_alike(given, due)


def end_alike(given: Mapping[str, str], due: Mapping[str, str]) -> bool:
    """Tell whether two answers both stop, with the document or at the next turn, or are both cut off at the limit."""
    return ends(given) == ends(due)


def quoted(answer: Mapping[str, str]) -> str:
    """Put an answer in one line, WIDTH characters of it at most; … follows if more does, or if it was cut off."""
    line = in_line(answer["text"].strip())
    return line if len(line) <= WIDTH and ends(answer) else f"{line[:WIDTH]}…"
