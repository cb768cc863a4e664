"""Rewards of the right answer, which rows have: numbers (gsm8k), formulas (math), texts (jsonl), choices; and what
--reward names."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from ..cli.errors import UserError, short
from ..evals.rows import Exact, choices_of, right_of, text_of
from .forms import Match, Schema
from .functions import FunctionReward
from .numbers import (
    final_answer,
    flexible_number,
    numbers_in,
    require_math_verify,
    same_answer,
    same_anywhere,
    strict_number,
)
from .reward import Answer, Reward

Row = Mapping[str, Any]


class RightAnswer(Reward):
    """1 if an answer is right by its row and a measure, `strict` unless another is named, else 0."""

    task: ClassVar[str]

    def __init__(self, measure: str = "") -> None:
        if measure not in ("", "strict", "flexible"):
            raise UserError(f"{self.task} has no measure {measure!r}; name strict or flexible")
        self.name = f"{self.task}:{measure}" if measure else self.task
        self.strict = measure != "flexible"

    def check(self, row: Row) -> None:
        self.due(row)

    def judge(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(self.right(answer.completion, self.due(answer.row))) for answer in answers]

    @abstractmethod
    def due(self, row: Row) -> str:
        """The right answer of a row. Raises UserError if it has none."""

    @abstractmethod
    def right(self, text: str, due: str) -> bool:
        """Whether a text gives the right answer."""


class Number(RightAnswer):
    """Numbers, as in GSM8K's rows and MetaMath's of that kind. strict: the number after #### or "The answer is" is
    right; flexible: the last number of the answer is."""

    task = "gsm8k"

    def due(self, row: Row) -> str:
        solution = text_of(row, "answer", "response", "solution")
        value = strict_number(solution)
        if value is None and len(found := numbers_in(solution)) == 1:
            value = found[0]
        if value is None:
            raise UserError(f"its answer {short(solution)!r} has no number after #### or 'The answer is'")
        return str(value)

    def right(self, text: str, due: str) -> bool:
        value = strict_number(text) if self.strict else flexible_number(text)
        return value is not None and str(value) == due


class Formula(RightAnswer):
    """Formulas, as in MATH's rows and MetaMath's of that kind. strict: the formula in the last box, or after "The
    answer is", is right; flexible: that or the last formula or number is."""

    task = "math"

    def __init__(self, measure: str = "") -> None:
        super().__init__(measure)
        require_math_verify()

    def due(self, row: Row) -> str:
        solution = text_of(row, "solution", "response", "answer")
        told = text_of(row, "answer") if "solution" in row and "answer" in row else final_answer(solution)
        if not told:
            raise UserError(f"its solution {short(solution)!r} has no \\boxed{{answer}}, nor 'The answer is'")
        return told

    def right(self, text: str, due: str) -> bool:
        given = final_answer(text)
        if given is not None and same_answer(given, due):
            return True
        return not self.strict and same_anywhere(text, due)


class Text(RightAnswer):
    """Texts, judged as the task jsonl of `rwkv-peft eval` judges them."""

    task = "jsonl"

    def due(self, row: Row) -> str:
        return Exact().problem(row, "").answer

    def right(self, text: str, due: str) -> bool:
        return Exact.judge(text, due)["strict" if self.strict else "flexible"]


class ChoicesReward(Reward):
    """1 if the answer is the right one of the row's choices, as its text or its label: "B", "(B)" and "B." are one."""

    name = "choices"

    def check(self, row: Row) -> None:
        self.right(row)

    def right(self, row: Row) -> tuple[str, str]:
        """The text and the label of a row's right choice."""
        texts, labels = choices_of(row)
        number = right_of(row, texts, labels)
        return texts[number], labels[number]

    def judge(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(said(answer.completion) in map(said, self.right(answer.row))) for answer in answers]


def said(text: str) -> str:
    """An answer without the marks around it."""
    return text.strip().removeprefix("(").removesuffix(".").removesuffix(")")


RIGHT = MappingProxyType({reward.task: reward for reward in (Number, Formula, Text)})
KINDS = (
    f"a task ({', '.join(RIGHT)}, choices; gsm8k:flexible names its measure), match:REGEX, json:SCHEMA.json or "
    "FILE.py:FUNCTION"
)


def reward_of(spec: str) -> Reward:
    """Make the Reward that a word of --reward names. Raises UserError, without the word, if it names none."""
    kind, _, rest = spec.partition(":")
    file, _, function = spec.rpartition(":")
    if kind in RIGHT:
        return RIGHT[kind](rest)
    if spec == ChoicesReward.name:
        return ChoicesReward()
    if kind == "match" and rest:
        return Match(rest)
    if kind == "json" and rest:
        return Schema(rest)
    if file.endswith(".py") and function.isidentifier():
        return FunctionReward(file, function)
    raise UserError(f"rewards are {KINDS}")
