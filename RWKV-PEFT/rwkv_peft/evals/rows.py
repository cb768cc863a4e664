"""Rows of one's own as problems: the layouts of a question, the two tasks, and how answers are judged."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from ..cli.errors import UserError, field_names, quoted, some
from ..data.templates import UnknownForm, layout_named, segments, stops_of
from ..data.turns import TURN_END, cleaned, field
from ..inference.prompts import made_of

Row = Mapping[str, Any]
FIELD = "{question}"
LAYOUTS = MappingProxyType(
    {
        "chat": "User: {question}\n\nAssistant:",
        "question": "Question: {question}\n\nAnswer:",
        "instruction": "Instruction: {question}\n\nResponse:",
        "plain": "{question}",
        # Alpaca's layout with the words that MetaMath's models were evaluated with
        "metamath": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step.",
    }
)
METAMATH_STOP = "\n\n### Instruction"


class Problem(NamedTuple):
    """One problem.

    prompt is the text that the model reads, solution the row's text after it (for examples), answer the right answer.
    For choices, continuations are the texts that may follow the prompt, and right is the number of the right one.
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


class Exact:
    """The task `jsonl`: the model writes an answer, which is right if it is the row's. strict: the same text except for
    space at its ends; flexible: also except for case, spacing and a final . ! ?"""

    layout: ClassVar[str] = ""  # the rows' own
    measures: ClassVar[tuple[str, ...]] = ("strict", "flexible")

    def problem(self, row: Row, layout: str, clean: bool = True) -> Problem:
        """Make the Problem of a row, in a layout's text if that is not ""; clean: clean the questions (data/turns.py).
        Raises UserError for a row without question and answer."""
        if layout:
            solution = text_of(row, "answer", "response", "output", "completion", "solution")
            question = text_of(row, "question", "query", "instruction", "prompt", "problem")
            return Problem(laid_out(layout, question, clean), behind(solution), solution.strip())
        try:
            parts = segments(row, clean=clean)
        except UnknownForm as error:
            raise UserError(f"{error}; give the fields such names") from error
        # in a chat the blank line after an answer counts too, and so does the next speaker's name; neither is an answer
        answers = [n for n in range(1, len(parts)) if parts[n][1] and not parts[n - 1][1]]
        if not answers:
            raise UserError("the row is one text, with no question before an answer")
        first, *rest = parts[answers[-1] :]
        solution = "".join([first[0], *(text for text, _ in rest if all(counts for _, counts in rest))])
        return Problem("".join(text for text, _ in parts[: answers[-1]]), solution, solution.strip())

    @staticmethod
    def judge(text: str, answer: str) -> dict[str, bool]:
        """Judge the text of an answer by the right one -> {measure: True if it is right}."""
        return {"strict": text.strip() == answer, "flexible": plain(text) == plain(answer)}


class Choices:
    """The task `choices`: the model's probabilities of a row's choices are compared. by sum: right if the right one has
    the highest log-probability; by byte: right if it has the highest log-probability per byte."""

    layout: ClassVar[str] = "question"
    measures: ClassVar[tuple[str, ...]] = ("by sum", "by byte")

    def problem(self, row: Row, layout: str, clean: bool = True) -> Problem:
        """Make the Problem of a row in a layout's text, as Exact does."""
        question = text_of(row, "question", "query", "prompt", "ctx", "goal")
        texts, labels = choices_of(row)
        right = right_of(row, texts, labels)
        continuations = tuple(map(behind, texts))
        return Problem(laid_out(layout, question, clean), continuations[right], texts[right], continuations, right)

    def judge(self, scores: Sequence[Score], problem: Problem) -> dict[str, bool]:
        """Judge the Scores of the choices -> {measure: True if the model prefers the right one}."""
        sums = [score.logprob for score in scores]
        means = [total / len(text.encode()) for total, text in zip(sums, problem.continuations)]
        return {name: values.index(max(values)) == problem.right for name, values in zip(self.measures, (sums, means))}


Task = Exact | Choices


def text_of(row: Row, *names: str) -> str:
    """Return the text of the first of some fields that the row has. Raises UserError if there is none, or no text."""
    if not isinstance(row, Mapping):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields")
    name = next((name for name in names if name in row), None)
    if name is None:
        raise UserError(f"a row has the fields {field_names(row)}; one of {', '.join(names)} is due")
    return field(row, name)


def laid_out(layout: str, question: str, clean: bool) -> str:
    """Put a question into the text of a layout; one that has turns takes it cleaned if `clean`."""
    return layout.replace(FIELD, cleaned(question.strip(), clean and bool(stops_of(layout))))


def behind(solution: str) -> str:
    """Lay out a solution as it follows a prompt: after one space."""
    return f" {solution.strip()}"


def plain(text: str) -> str:
    """A text without case, spacing and a final . ! ?"""
    return re.sub(r"[\s.!?]+$", "", " ".join(text.casefold().split()))


def choices_of(row: Row) -> tuple[list[str], list[str]]:
    """Return (the texts to choose from, their labels: A, B, … or the row's). Raises UserError for a row without."""
    found: Any = next((row[name] for name in ("choices", "endings", "options") if name in row), None)
    labels = None
    if isinstance(found, Mapping):  # as ARC has them
        found, labels = found.get("text"), found.get("label")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(text, str) and text for text in found):
        raise UserError("the row has no choices: a list of two texts or more is due, as choices, endings or options")
    if not isinstance(labels, list) or len(labels) != len(found):
        labels = [chr(ord("A") + number) for number in range(len(found))]
    return [text.strip() for text in found], [str(label) for label in labels]


def right_of(row: Row, texts: Sequence[str], labels: Sequence[str]) -> int:
    """Return the number of the right choice, which the row names by its place from 0, its label or its text. Labels are
    tried first; a JSON number is then read as a place before it is read as a text, because choices may be numbers too.
    Raises UserError if it names none."""
    told: Any = next((row[name] for name in ("answer", "label", "answerKey", "gold") if name in row), None)
    places = [str(number) for number in range(len(texts))]
    for known in (labels, places, texts) if isinstance(told, int) else (labels, texts, places):
        if not isinstance(told, bool) and isinstance(told, (str, int)) and str(told).strip() in known:
            return list(known).index(str(told).strip())
    raise UserError(
        f"its answer {quoted(told)} is none of its choices: a place from 0, one of {some(labels, 26)}, or the text is "
        "due, as answer, label, answerKey or gold"
    )


def layout_of(task: Task, name: str | None, flag: str = "--template") -> str:
    """Return the text of the layout that a flag names, one of LAYOUTS or a file, else the task's; "": the rows' own.
    Raises UserError if it has no {question}."""
    if not (name := name or task.layout):
        return ""
    text = layout_named(name, LAYOUTS, flag)
    if FIELD not in text:
        raise UserError(f"{flag} {name}: it has no {FIELD}, the place of a question; add it")
    return text


def stops_of_prompt(prompt: str) -> tuple[str, ...]:
    """The texts that end an answer: the opening of the next question in a known layout, else none."""
    return (METAMATH_STOP,) if "### Response:" in prompt else stops_of(prompt)


def example(problem: Problem) -> str:
    """Lay out a solved problem as an example before the question."""
    return problem.prompt + problem.solution.rstrip() + TURN_END


def read_problems(task: Task, path: str, split: str, layout: str, clean: bool) -> list[Problem]:
    """Read the Problems of a file. Raises UserError for a row that is none, with its place, and if there are none."""
    problems = made_of(path, lambda row: task.problem(row, layout, clean), split)
    if not problems:
        raise UserError(f"{path} holds no problem" + (f" in {split}" if split else ""))
    return problems
