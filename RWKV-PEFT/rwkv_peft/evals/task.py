"""What a task says of itself, so that decoding, scoring, files and the table work on any."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UserError
from .layouts import FIELD

Row = Mapping[str, Any]


class Problem(NamedTuple):
    """prompt is what the model reads, solution what the row has behind it, answer what is right. continuations, of a
    task that scores them, are what may follow the prompt, right the number of the right one."""

    prompt: str
    solution: str
    answer: str
    continuations: tuple[str, ...] = ()
    right: int = 0


class Score(NamedTuple):
    """The log-probability of a continuation behind its prompt, in nats, and whether each of its tokens is the most
    probable one."""

    logprob: float
    greedy: bool


class Task(ABC):
    """layout is the name of the one that it has unless told otherwise ("": the row's own); measures are what is told of
    each problem, right or wrong."""

    layout: str
    measures: tuple[str, ...]

    @abstractmethod
    def problem(self, row: Row, layout: str) -> Problem:
        """The Problem of a row in the text of a layout. Raises UserError for a row that is none."""


class AnswerTask(Task):
    """A task whose answers the model writes."""

    @abstractmethod
    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        """{measure: whether the text is right}."""


class ChoiceTask(Task):
    """A task whose continuations the model finds more or less probable."""

    @abstractmethod
    def judge(self, scores: Sequence[Score], problem: Problem) -> dict[str, bool]:
        """{measure: whether the model is right}, of a Score for each continuation."""


def behind(solution: str) -> str:
    """A solution as it follows a prompt in a layout."""
    return f" {solution.strip()}"


def put(layout: str, question: str) -> str:
    """A question in the text of a layout."""
    return layout.replace(FIELD, question.strip())


def text_of(row: Row, *names: str) -> str:
    """The first of some fields that a row has, which is a text. Raises UserError."""
    if not isinstance(row, Mapping):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields")
    name = next((name for name in names if name in row), None)
    if name is None:
        raise UserError(
            f"a row has the fields {', '.join(map(str, row)) or '(none)'}; one of {', '.join(names)} is due"
        )
    if not isinstance(row[name], str):
        raise UserError(f"field {name!r} holds {type(row[name]).__name__}, not text")
    return row[name]
