"""The kinds of rewards: right answers (gsm8k, math, jsonl, choices), forms (a regular expression, a JSON schema), and
functions of the user's."""

import importlib.util
import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

from ..checkpoints.readable import reading, require_readable
from ..cli.errors import UserError, field_names, short, summarize
from ..cli.installing import how_to_install
from ..environments.user_code import load
from ..evals.rows import Exact, Fields, choices_of, right_of, text_of
from .numbers import (
    final_answer,
    flexible_number,
    numbers_in,
    require_math_verify,
    same_answer,
    same_anywhere,
    strict_number,
)

ENVIRONMENTS = "environments"  # the parameter of a reward that reads them


class Answer(NamedTuple):
    """A completion to judge, with its prompt as the model read it, the prompt's row, and the attributes of the
    conversation's environment, if it has one."""

    prompt: str
    completion: str
    row: Fields
    environment: Mapping[str, Any] | None = None


class Reward(ABC):
    """Judges answers; name is its key among the rewards of a run. With `alone` it is given one answer at a time, so
    that a message can name the one at which it fails."""

    name: str
    alone: ClassVar[bool] = True

    def check(self, row: Fields) -> None:  # noqa: B027  (a reward of the text alone reads no row)
        """Raise UserError for a row that lacks the right answer, or another field that is read."""

    @abstractmethod
    def score(self, answers: Sequence[Answer]) -> Sequence[object]:
        """A number for each answer, or None for one that it does not judge."""


class RightAnswer(Reward):
    """1 if an answer is right by its row and a measure, `strict` unless another is named, else 0."""

    task: ClassVar[str]

    def __init__(self, measure: str = "") -> None:
        if measure not in ("", "strict", "flexible"):
            raise UserError(f"{self.task} has no measure {measure!r}; name strict or flexible")
        self.name = f"{self.task}:{measure}" if measure else self.task
        self.strict = measure != "flexible"

    def check(self, row: Fields) -> None:
        self.due(row)

    def score(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(self.right(answer.completion, self.due(answer.row))) for answer in answers]

    @abstractmethod
    def due(self, row: Fields) -> str:
        """The right answer of a row. Raises UserError if it has none."""

    @abstractmethod
    def right(self, text: str, due: str) -> bool:
        """True if a text gives the right answer."""


class Number(RightAnswer):
    """Numbers, as in GSM8K's rows and MetaMath's of that kind. strict: the number after #### or "The answer is" is
    right; flexible: the last number of the answer is."""

    task = "gsm8k"

    def due(self, row: Fields) -> str:
        solution = text_of(row, "answer", "response", "solution")
        value = strict_number(solution)
        if value is None and len(numbers := numbers_in(solution)) == 1:
            value = numbers[0]
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

    def due(self, row: Fields) -> str:
        solution = text_of(row, "solution", "response", "answer")
        gold = text_of(row, "answer") if "solution" in row and "answer" in row else final_answer(solution)
        if not gold:
            raise UserError(f"its solution {short(solution)!r} has no \\boxed{{answer}}, nor 'The answer is'")
        return gold

    def right(self, text: str, due: str) -> bool:
        answer = final_answer(text)
        if answer is not None and same_answer(answer, due):
            return True
        return not self.strict and same_anywhere(text, due)


class Text(RightAnswer):
    """Texts, judged as the task jsonl of `rwkv-peft eval` judges them."""

    task = "jsonl"

    def due(self, row: Fields) -> str:
        return Exact().problem(row, "").answer

    def right(self, text: str, due: str) -> bool:
        return Exact.score(text, due)["strict" if self.strict else "flexible"]


class ChoicesReward(Reward):
    """1 if the answer is the right one of the row's choices, as its text or its label: "B", "(B)" and "B." are one."""

    name = "choices"

    def check(self, row: Fields) -> None:
        self.right(row)

    def right(self, row: Fields) -> tuple[str, str]:
        """The text and the label of a row's right choice."""
        texts, labels = choices_of(row)
        number = right_of(row, texts, labels)
        return texts[number], labels[number]

    def score(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(bare(answer.completion) in map(bare, self.right(answer.row))) for answer in answers]


def bare(text: str) -> str:
    """An answer without the marks around it."""
    return text.strip().removeprefix("(").removesuffix(".").removesuffix(")")


class Match(Reward):
    """1 if the whole answer, without space at its ends, matches a regular expression, else 0."""

    name = "match"

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"no regular expression of Python: {summarize(error)}; mend it") from error

    def score(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(bool(self.pattern.fullmatch(answer.completion.strip()))) for answer in answers]


class Schema(Reward):
    """1 if the whole answer is JSON that satisfies a JSON schema, else 0."""

    def __init__(self, file: str) -> None:
        self.name = Path(file).stem
        if importlib.util.find_spec("jsonschema") is None:
            raise UserError(f"this Python has no package jsonschema; {how_to_install('eval')}")
        from jsonschema import validators
        from referencing import Registry

        require_readable(file, "no such file; name a JSON schema")
        with reading("the file", "is no JSON schema that is read here", "write it by draft 2020-12"):
            schema = json.loads(Path(file).read_text(encoding="utf-8-sig"))
            kind = validators.validator_for(schema, validators.Draft202012Validator)
            kind.check_schema(schema)
        self.validator = kind(schema, registry=Registry())  # the default one would fetch a $ref from the network

    def score(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(self.satisfied(answer.completion)) for answer in answers]

    def satisfied(self, text: str) -> bool:
        """True if a text is JSON, without NaN and Infinity, that satisfies the schema."""
        try:
            value = json.loads(text, parse_constant=no_constant)
            return bool(self.validator.is_valid(value))
        except (ValueError, RecursionError):  # no JSON, or brackets within a thousand others
            return False


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class FunctionReward(Reward):
    """A function of a Python file in trl's form, f(prompts, completions, **fields): it is given lists of those that it
    takes, with None for a row that lacks a field. `environments` are objects with the attributes of the conversations'
    environments, as they are at the end."""

    alone = False

    def __init__(self, file: str, function: str) -> None:
        self.name, self.file = function, file
        require_readable(file, "no such file; name a Python file, as FILE.py:FUNCTION")
        found = getattr(load(file), function, None)
        if not callable(found) or inspect.isclass(found):
            raise UserError(f"the file has no function {function}; name a function of it")
        self.function: Callable[..., Any] = found
        self.parameters = inspect.signature(found).parameters.values()
        self.takes_all = any(one.kind is one.VAR_KEYWORD for one in self.parameters)

    def check(self, row: Fields) -> None:
        given = {"prompts", "completions", ENVIRONMENTS, *row}
        for one in self.parameters:
            variadic = one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
            if one.default is one.empty and not variadic and one.name not in given:
                raise UserError(
                    f"the function takes {one.name}, and the row has the fields {field_names(row)}; "
                    "add the field, or give the parameter a default"
                )

    def score(self, answers: Sequence[Answer]) -> Sequence[object]:
        names = dict.fromkeys(name for answer in answers for name in answer.row)
        given = {name: [answer.row.get(name) for answer in answers] for name in names}
        given["prompts"] = [answer.prompt for answer in answers]
        given["completions"] = [answer.completion for answer in answers]
        if any(one.name == ENVIRONMENTS for one in self.parameters):
            given[ENVIRONMENTS] = [SimpleNamespace(**(answer.environment or {})) for answer in answers]
        if not self.takes_all:
            given = {one.name: given[one.name] for one in self.parameters if one.name in given}
        returned = self.function(**given)
        if not isinstance(returned, Iterable):
            raise UserError(f"it returned {type(returned).__name__}; return a list with a number for each completion")
        scores = list(returned)
        if len(scores) != len(answers):
            raise UserError(
                f"it returned {len(scores)} values for {len(answers)} completions; return one for each, None for one "
                "that it does not judge"
            )
        return scores


RIGHT = MappingProxyType({reward.task: reward for reward in (Number, Formula, Text)})
KINDS = (
    f"a task ({', '.join(RIGHT)}, choices; gsm8k:flexible names its measure), match:REGEX, json:SCHEMA.json or "
    "FILE.py:FUNCTION"
)


def reward_of(spec: str) -> Reward:
    """The Reward for a value of --reward. Raises UserError, without the value, if it names none."""
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
