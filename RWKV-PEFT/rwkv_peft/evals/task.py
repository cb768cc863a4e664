"""The interface of a task, so that decoding, scoring, files and the table of scores work with any."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data.templates import stops_of
from ..data.turns import cleaned, field
from ..errors import UserError, field_names
from ..generate.prompts import made_of
from .layouts import FIELD, read_layout

Row = Mapping[str, Any]


class Problem(NamedTuple):
    """One problem.

    prompt is the text that the model reads, solution the row's text after it (for examples), answer the right answer.
    In a task that scores continuations, these are the texts that may follow the prompt, and right is the number of the
    right one.
    """

    prompt: str
    solution: str
    answer: str
    continuations: tuple[str, ...] = ()
    right: int = 0


class Score(NamedTuple):
    """The log-probability of a continuation, in nats; greedy is True if each of its tokens is the most probable."""

    logprob: float
    greedy: bool


class Task(ABC):
    """A kind of problem: how rows become Problems, and how answers are judged.

    layout is the name of its default layout ("": the row's own); measures are the names of its judgements, each right
    or wrong; the first one counts as the score. clean: whether questions are cleaned, as those of rows (data/turns.py).
    """

    layout: str
    measures: tuple[str, ...]
    clean: bool = True

    def require(self) -> None:  # noqa: B027  most tasks need none
        """Raise UserError if a package that it needs is missing."""

    @abstractmethod
    def problem(self, row: Row, layout: str) -> Problem:
        """Make the Problem of a row in the text of a layout. Raises UserError for a row that is none."""

    def put(self, layout: str, question: str) -> str:
        """Put a question into the text of a layout; one that has turns takes it cleaned."""
        return layout.replace(FIELD, cleaned(question.strip(), self.clean and bool(stops_of(layout))))


class AnswerTask(Task):
    """A task in which the model writes the answers."""

    @abstractmethod
    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        """Judge the text of an answer -> {measure: True if it is right}."""


class ChoiceTask(Task):
    """A task in which the model's probabilities of given continuations are compared."""

    @abstractmethod
    def judge(self, scores: Sequence[Score], problem: Problem) -> dict[str, bool]:
        """Judge the Scores of all continuations -> {measure: True if the model is right}."""


def behind(solution: str) -> str:
    """Lay out a solution as it follows a prompt: after one space."""
    return f" {solution.strip()}"


def text_of(row: Row, *names: str) -> str:
    """Return the text of the first of some fields that the row has. Raises UserError if there is none, or no text."""
    if not isinstance(row, Mapping):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields")
    name = next((name for name in names if name in row), None)
    if name is None:
        raise UserError(f"a row has the fields {field_names(row)}; one of {', '.join(names)} is due")
    return field(row, name)


def layout_of(task: Task, name: str | None, flag: str = "--template") -> str:
    """Return the text of the layout that a flag names, else the task's; "": the rows' own. Raises as read_layout."""
    return read_layout(name or task.layout, flag) if name or task.layout else ""


def read_problems(task: Task, path: str, split: str, layout: str) -> list[Problem]:
    """Read the Problems of a file. Raises UserError for a row that is none, with its place, and if there are none."""
    problems = made_of(path, lambda row: task.problem(row, layout), split)
    if not problems:
        raise UserError(f"{path} holds no problem" + (f" in {split}" if split else ""))
    return problems
