"""Questions with several answers to choose from, in the forms of common data sets."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from .task import ChoiceTask, Problem, Row, Score, behind, put, text_of


class Choices(ChoiceTask):
    """by sum: the continuation of the highest probability; by byte: of the highest log-probability a byte of it."""

    layout, measures = "question", ("by sum", "by byte")

    def problem(self, row: Row, layout: str) -> Problem:
        question = text_of(row, "question", "query", "prompt", "ctx", "goal")
        texts, labels = choices_of(row)
        right = right_of(row, texts, labels)
        continuations = tuple(map(behind, texts))
        return Problem(put(layout, question), continuations[right], texts[right], continuations, right)

    def judge(self, scores: Sequence[Score], problem: Problem) -> dict[str, bool]:
        sums = [score.logprob for score in scores]
        means = [total / len(text.encode()) for total, text in zip(sums, problem.continuations)]
        return {name: values.index(max(values)) == problem.right for name, values in zip(self.measures, (sums, means))}


def choices_of(row: Row) -> tuple[list[str], list[str]]:
    """(the texts to choose from, their labels: A, B, … unless the row names others)."""
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
    """The number of the right one, which the row names by its place from 0, its label, or its text. A number of JSON is
    a place before it is a text, as choices may be numbers too."""
    told: Any = next((row[name] for name in ("answer", "label", "answerKey", "gold") if name in row), None)
    places = [str(number) for number in range(len(texts))]
    for known in (labels, places, texts) if isinstance(told, int) else (labels, texts, places):
        if not isinstance(told, bool) and isinstance(told, (str, int)) and str(told).strip() in known:
            return list(known).index(str(told).strip())
    raise UserError(
        f"its answer {told!r} is none of its choices: a place from 0, one of {', '.join(labels)}, or the text is due, "
        "as answer, label, answerKey or gold"
    )
