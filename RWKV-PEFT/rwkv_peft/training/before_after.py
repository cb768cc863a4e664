"""A few rows of a run's data, answered before its first step and after its last one: whether it learned, to be seen."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..cli import counted
from ..files.atomic import atomic_write
from .examiner import Answer, Exam, answers_of
from .watch import Watch

SHOWN, WIDTH = 2, 100  # rows of each kind that are printed, and characters of a line
NEVER = "not known"  # an answer before training, of a run whose rows.jsonl is not there any more


class Rows(Exam, Protocol):
    """An exam of rows of the data (evals/rows_exam.py): `prompts` are their texts, `kinds` name the data that each is
    of, and digest is equal for equal rows."""

    prompts: list[str]
    kinds: list[str]

    @property
    def digest(self) -> str: ...

    def answer(self, number: int) -> dict[str, str]:
        """{"text", "end"} of the row's own answer."""


class BeforeAfter:
    """Called on all ranks: before() ahead of the first step, after() when the last one is done. Rank 0 keeps the
    answers at `path`, a row a line, so that a run that goes on still has those from before it began; `anew` tells a
    run that begins from one that goes on."""

    def __init__(self, exam: Rows, path: Path, watch: Watch, compiles: bool, anew: bool) -> None:
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
            with atomic_write(self.path) as temporary:
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
                temporary.write_text(lines, encoding="utf-8", errors="backslashreplace")

    @property
    def changed(self) -> bool | None:
        """Whether an answer is another than before training; None while that is not known."""
        pairs = [(record["before"], record.get("after")) for record in self.records]
        if not pairs or not all(before and after for before, after in pairs):
            return None
        return any(before != after for before, after in pairs)

    def lines(self) -> Iterator[str]:
        """What is printed at the end of a run; nothing if it ended before the last step."""
        done = [record for record in self.records if "after" in record]
        kinds = dict.fromkeys(record["of"] for record in done)
        for name in kinds:
            mine = [record for record in done if record["of"] == name]
            yield f"{counted(len(mine), f'{name} row')}: {agreement(mine)}"
            for record in mine[:SHOWN]:
                prompt, before = in_line(record["prompt"]), record["before"]
                yield f"  prompt  {prompt if len(prompt) <= WIDTH else '…' + prompt[-WIDTH:]}"
                yield f"  row     {quoted(record['answer'])}"
                yield f"  before  {quoted(before) if before else NEVER}"
                yield f"  after   {quoted(record['after'])}"


def read_before(path: Path, exam: Rows) -> Sequence[Answer | None]:
    """The answers before training that a run's file keeps; None for each if it is missing, damaged, or of other
    rows."""
    unknown = [None] * len(exam)
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        answers = [record["before"] for record in records if record["rows"] == exam.digest]
        texts = [(answer["text"], answer["end"]) for answer in answers if answer is not None]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return unknown
    whole = all(isinstance(word, str) for pair in texts for word in pair)
    return answers if whole and len(answers) == len(records) == len(exam) else unknown


def agreement(records: Sequence[Mapping[str, Any]]) -> str:
    """How many answers are the rows' own, and how many end as those do, after training and before."""
    after = [(record["after"], record["answer"]) for record in records]
    before = [(record["before"], record["answer"]) for record in records if record["before"]]
    right, ends, right_before, ends_before = (
        str(sum(agrees(given, due) for given, due in answers)) if answers else NEVER
        for answers in (after, before)
        for agrees in (same, end_alike)
    )
    return (
        f"{right} answered word for word ({right_before} before training), {ends} end where the row does "
        f"({ends_before} before)"
    )


def same(given: Mapping[str, str], due: Mapping[str, str]) -> bool:
    """Whether two answers have the same words, and end in the same way."""
    return given["text"].strip() == due["text"].strip() and end_alike(given, due)


def end_alike(given: Mapping[str, str], due: Mapping[str, str]) -> bool:
    """Whether two answers end in the same way: with the document, where the next turn would begin, or cut off."""
    return given["end"] == due["end"]


def quoted(answer: Mapping[str, str]) -> str:
    """An answer in one line, its beginning if it is long; one that was cut off goes on with dots."""
    line = in_line(answer["text"])
    return line if len(line) <= WIDTH and answer["end"] != "length" else f"{line[:WIDTH]}…"


def in_line(text: str) -> str:
    """A text in one line, in which a terminal finds nothing to obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text.strip())
