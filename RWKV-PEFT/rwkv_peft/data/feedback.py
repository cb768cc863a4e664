"""Feedback on answers, as rows: a better answer beside the one that it corrects, or an answer with a label.

The chat, serve and the page append them to one file. Each kind of rows reads from it what it can learn.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.atomic import append_text, check_output, telling_failures
from ..cli.errors import UserError
from ..cli.parser import counted
from .fields import LISTS, Row, without
from .forms import CHATS, LABELLED, SIDES, label_of
from .rows import JSON_LINES
from .tokenizer import Tokenizer

NOTES = ("model", "adapter", "time")  # fields on where and when an answer was given
MESSAGES, LABEL, (BETTER, WORSE) = CHATS[0], LABELLED[0], SIDES[0]
Turn = Mapping[str, Any]


class Answered(NamedTuple):
    """An answer: the turns before it and its own, {role, content} each; the files of the model and its adapters; the
    tools that it might call; False for `whole` if it was cut off."""

    turns: Sequence[Turn]
    answer: Turn
    model: str
    adapter: str
    tools: Sequence[Mapping[str, Any]] = ()
    whole: bool = True


@dataclass(frozen=True)
class FeedbackFile:
    """The file of --feedback. A better answer has at most `longest` tokens, as --max_tokens allows answers."""

    path: str
    tokenizer: Tokenizer
    longest: int

    def correct(self, answered: Answered, text: str) -> None:
        """Append a better answer. Raises UserError for an empty one, and for one that is too long."""
        if not text.strip():
            raise UserError("the better answer is empty; write what the model should have said")
        if (length := len(self.tokenizer.encode(text))) > self.longest:
            raise UserError(
                f"the better answer has {counted(length, 'token')}, and an answer has at most {self.longest:,}; "
                "shorten it, or start with a larger --max_tokens"
            )
        words = answered.answer["content"] if answered.answer.keys() == {"role", "content"} else answered.answer
        self._append(answered, {MESSAGES: [*answered.turns], BETTER: text.strip(), WORSE: words})

    def judge(self, answered: Answered, good: bool) -> None:
        """Append a label, True for a good answer. Raises UserError for a good one that was cut off."""
        if good and not answered.whole:
            raise UserError("the answer was cut off, and would be learned so; write it out as a better one")
        self._append(answered, {MESSAGES: [*answered.turns, answered.answer], LABEL: good})

    def _append(self, answered: Answered, row: dict[str, Any]) -> None:
        tools = {LISTS[0]: [*answered.tools]} if answered.tools else {}
        notes = (answered.model, answered.adapter, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        with telling_failures(Path(self.path), "the feedback before is there"):
            append_text(self.path, json.dumps(row | tools | dict(zip(NOTES, notes)), ensure_ascii=False) + "\n")


def scaled(file: str, scale: float) -> str:
    """An adapter as a flag names it: FILE, or FILE=SCALE."""
    return file if scale == 1 else f"{file}={scale:g}"


def check_feedback_file(path: str, inputs: Iterable[tuple[str, str | Path | None]]) -> None:
    """Raise UserError for a file of --feedback that is an input, cannot be written, or is not named as rows are."""
    if not path.endswith(JSON_LINES):
        raise UserError(f"--feedback {path}: rows are read from files named .jsonl; name it so")
    check_output("--feedback", path, inputs)


def is_feedback(row: object) -> bool:
    return isinstance(row, dict) and all(name in row for name in (MESSAGES, *NOTES)) and (LABEL in row or BETTER in row)


def learned_as(row: Row, kind: str) -> dict[str, Any] | None:
    """A row of feedback as one of a kind of rows, a key of encoding.NAMED; None if that kind cannot learn from it.

    Pairs are corrections, and labels are marks. Chats are better answers and good ones.
    """
    rest = without(row, *NOTES)
    if kind == "prompts" or kind == ("labels" if LABEL in row else "pairs"):
        return rest
    if kind in ("pairs", "labels") or (LABEL in row and not label_of(row, ())):
        return None
    if LABEL in row:
        return without(rest, LABEL)
    better = {"role": "assistant", "content": row[BETTER]}
    return without(rest, BETTER, WORSE) | {MESSAGES: [*row[MESSAGES], better]}
