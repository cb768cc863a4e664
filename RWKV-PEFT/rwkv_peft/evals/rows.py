"""Rows of one's own as problems: the layouts of a question, the two tasks, and how their answers are judged."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from ..cli.errors import UserError, field_names, quoted, some
from ..data.chat import CHAT, TURN_END, ChatLayout, stops_of
from ..data.fields import UnknownForm, field, json_kind
from ..data.layouts import RowLayout, layout_named
from ..inference.prompts import made_of

Fields = Mapping[str, Any]  # of a row
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
    """A prompt with its right answer; solution is the row's text after the prompt, for few-shot examples.

    Choices have continuations, the texts that may follow the prompt, and the number of the right one.
    """

    prompt: str
    solution: str
    answer: str
    continuations: tuple[str, ...] = ()
    right: int = 0


class Exact:
    """The task `jsonl`: a generated answer is compared with the row's. strict: the same text except for space at its
    ends; flexible: also except for case, spacing and a final . ! ?"""

    layout: ClassVar[str] = ""  # the rows' own
    measures: ClassVar[tuple[str, ...]] = ("strict", "flexible")

    def problem(self, row: Fields, layout: str, chat: ChatLayout = CHAT) -> Problem:
        """The Problem of a row, in a layout's text ("": the row's own form), with chats as in
        `chat`. Raises UserError for a row without question and answer."""
        if layout:
            solution = text_of(row, "answer", "response", "output", "completion", "solution")
            question = text_of(row, "question", "query", "instruction", "prompt", "problem")
            return Problem(laid_out(layout, question, chat), behind(solution), solution.strip())
        try:
            parts = RowLayout(clean=chat.clean, tool_form=chat.tool_form).segments(row)
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
    def score(text: str, answer: str) -> dict[str, bool]:
        """Compare an answer's text with the right one -> {measure: True if it is right}."""
        return {"strict": text.strip() == answer, "flexible": plain(text) == plain(answer)}


class Choices:
    """The task `choices`: the log-probabilities of a row's choices are compared. by sum: right if the right choice has
    the highest; by byte: right if it has the highest per byte."""

    layout: ClassVar[str] = "question"
    measures: ClassVar[tuple[str, ...]] = ("by sum", "by byte")

    def problem(self, row: Fields, layout: str, chat: ChatLayout = CHAT) -> Problem:
        """The Problem of a row in a layout's text, as Exact has it."""
        question = text_of(row, "question", "query", "prompt", "ctx", "goal")
        texts, labels = choices_of(row)
        right = right_of(row, texts, labels)
        continuations = tuple(map(behind, texts))
        return Problem(laid_out(layout, question, chat), continuations[right], texts[right], continuations, right)

    def score(self, logprobs: Sequence[float], problem: Problem) -> dict[str, bool]:
        """Compare the choices' log-probabilities, in nats -> {measure: True if the right choice has the highest}."""
        means = [total / len(text.encode()) for total, text in zip(logprobs, problem.continuations)]
        pairs = zip(self.measures, (logprobs, means))
        return {name: values.index(max(values)) == problem.right for name, values in pairs}


Task = Exact | Choices


def text_of(row: Fields, *names: str) -> str:
    """The text of the first of some fields that a row has. Raises UserError if it has none, or it holds no text."""
    if not isinstance(row, Mapping):
        raise UserError(f"a row is {json_kind(row)}, not an object with fields")
    name = next((name for name in names if name in row), None)
    if name is None:
        raise UserError(f"a row has the fields {field_names(row)}; one of {', '.join(names)} is due")
    return field(row, name)


def laid_out(layout: str, question: str, chat: ChatLayout) -> str:
    """A question in the text of a layout; in a layout of turns it is cleaned as in chats."""
    question = question.strip()
    return layout.replace(FIELD, chat.cleaned(question) if stops_of(layout) else question)


def behind(solution: str) -> str:
    """A solution as it follows a prompt: after one space."""
    return f" {solution.strip()}"


def plain(text: str) -> str:
    """A text without case, spacing and a final . ! ?"""
    return re.sub(r"[\s.!?]+$", "", " ".join(text.casefold().split()))


def choices_of(row: Fields) -> tuple[list[str], list[str]]:
    """The texts to choose from and their labels (A, B, … or the row's). Raises UserError for a row without choices."""
    choices: Any = next((row[name] for name in ("choices", "endings", "options") if name in row), None)
    labels = None
    if isinstance(choices, Mapping):  # as ARC has them
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        raise UserError("the row has no choices: a list of two texts or more is due, as choices, endings or options")
    if not isinstance(labels, list) or len(labels) != len(choices):
        labels = [chr(ord("A") + number) for number in range(len(choices))]
    return [text.strip() for text in choices], [str(label) for label in labels]


def right_of(row: Fields, texts: Sequence[str], labels: Sequence[str]) -> int:
    """The number of the right choice, by its place from 0, its label or its text in the row. Labels are tried first; a
    JSON number is then read as a place before it is read as a text, because choices may be numbers too. Raises
    UserError if it is none of them."""
    gold: Any = next((row[name] for name in ("answer", "label", "answerKey", "gold") if name in row), None)
    places = [str(number) for number in range(len(texts))]
    for names in (labels, places, texts) if isinstance(gold, int) else (labels, texts, places):
        if not isinstance(gold, bool) and isinstance(gold, (str, int)) and str(gold).strip() in names:
            return list(names).index(str(gold).strip())
    raise UserError(
        f"its answer {quoted(gold)} is none of its choices: a place from 0, one of {some(labels, 26)}, or the text is "
        "due, as answer, label, answerKey or gold"
    )


def layout_of(task: Task, name: str | None, flag: str = "--template") -> str:
    """The text of a flag's layout (a name of LAYOUTS, or a file), else the task's; "": the rows' own form. Raises
    UserError if it has no {question}."""
    if not (name := name or task.layout):
        return ""
    text = layout_named(name, LAYOUTS, flag)
    if FIELD not in text:
        raise UserError(f"{flag} {name}: it has no {FIELD}, the place of a question; add it")
    return text


def stops_of_prompt(prompt: str) -> tuple[str, ...]:
    """The stop texts of an answer: the beginning of the next question in a known layout, else none."""
    return (METAMATH_STOP,) if "### Response:" in prompt else stops_of(prompt)


def example(problem: Problem) -> str:
    """A solved problem as a few-shot example."""
    return problem.prompt + problem.solution.rstrip() + TURN_END


def read_problems(task: Task, path: str, split: str, layout: str, chat: ChatLayout) -> list[Problem]:
    """Read the Problems of a file's rows. Raises UserError for an unfit row, with its place, and for a file without
    rows."""
    problems = made_of(path, lambda row: task.problem(row, layout, chat), split)
    if not problems:
        raise UserError(f"{path} holds no problem" + (f" in {split}" if split else ""))
    return problems
