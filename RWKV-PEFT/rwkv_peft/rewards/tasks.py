"""Reads what --reward names; the rewards of tasks of `rwkv-peft eval` tell whether an answer is right."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..evals.choices import choices_of, right_of
from ..evals.layouts import read_layout
from ..evals.task import AnswerTask
from ..tables import WRITTEN
from .forms import Match, Schema
from .functions import FunctionReward
from .reward import Answer, Reward


class TaskReward(Reward):
    """1 if a task's measure, the first unless one is named, calls the answer right by its row, else 0."""

    def __init__(self, name: str, measure: str = "") -> None:
        task: AnswerTask = WRITTEN[name]()
        if measure and measure not in task.measures:
            raise UserError(f"{name} has no measure {measure!r}; name {' or '.join(task.measures)}")
        task.require()
        self.name = f"{name}:{measure}" if measure else name
        self.task, self.measure = task, measure or task.measures[0]
        self.layout = read_layout(task.layout, "--reward") if task.layout else ""

    def check(self, row: Mapping[str, Any]) -> None:
        self.task.problem(row, self.layout)

    def judge(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [
            float(self.task.judge(answer.completion, self.task.problem(answer.row, self.layout))[self.measure])
            for answer in answers
        ]


class ChoicesReward(Reward):
    """1 if the answer is the right one of the row's choices, as its text or its label: "B", "(B)" and "B." are one."""

    name = "choices"

    def check(self, row: Mapping[str, Any]) -> None:
        self.right(row)

    def right(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The text and the label of a row's right choice."""
        texts, labels = choices_of(row)
        number = right_of(row, texts, labels)
        return texts[number], labels[number]

    def judge(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(said(answer.completion) in map(said, self.right(answer.row))) for answer in answers]


def said(text: str) -> str:
    """An answer without the marks around it."""
    return text.strip().removeprefix("(").removesuffix(".").removesuffix(")")


KINDS = (
    f"a task ({', '.join(WRITTEN)}, choices; gsm8k:flexible names its measure), match:REGEX, json:SCHEMA.json or "
    "FILE.py:FUNCTION"
)


def reward_of(spec: str) -> Reward:
    """Make the Reward that a word of --reward names. Raises UserError, without the word, if it names none."""
    kind, _, rest = spec.partition(":")
    file, _, function = spec.rpartition(":")
    if kind in WRITTEN:
        return TaskReward(kind, rest)
    if spec == ChoicesReward.name:
        return ChoicesReward()
    if kind == "match" and rest:
        return Match(rest)
    if kind == "json" and rest:
        return Schema(rest)
    if file.endswith(".py") and function.isidentifier():
        return FunctionReward(file, function)
    raise UserError(f"rewards are {KINDS}")
