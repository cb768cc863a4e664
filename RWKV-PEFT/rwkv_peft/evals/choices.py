"""Tasks whose continuations are scored: questions with several answers to choose from, and LAMBADA."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, quoted, short, some
from .task import ChoiceTask, Problem, Row, Score, behind, text_of


class Choices(ChoiceTask):
    """The task of choosing an answer. by sum: right if the right continuation has the highest log-probability; by byte:
    right if it has the highest log-probability per byte."""

    layout, measures = "question", ("by sum", "by byte")

    def problem(self, row: Row, layout: str) -> Problem:
        question = text_of(row, "question", "query", "prompt", "ctx", "goal")
        texts, labels = choices_of(row)
        right = right_of(row, texts, labels)
        continuations = tuple(map(behind, texts))
        return Problem(self.put(layout, question), continuations[right], texts[right], continuations, right)

    def judge(self, scores: Sequence[Score], problem: Problem) -> dict[str, bool]:
        sums = [score.logprob for score in scores]
        means = [total / len(text.encode()) for total, text in zip(sums, problem.continuations)]
        return {name: values.index(max(values)) == problem.right for name, values in zip(self.measures, (sums, means))}


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


class Lambada(ChoiceTask):
    """LAMBADA (Paperno et al. 2016, arXiv 1606.06031): guess the last word of a passage, which takes the whole passage.
    last word: right if each of its tokens is the most probable one; its perplexity is reported as well."""

    layout, measures = "plain", ("last word",)

    def problem(self, row: Row, layout: str) -> Problem:
        text = text_of(row, "text").strip()
        before, space, word = text.rpartition(" ")
        if not before.strip():
            raise UserError(f"the text {short(text)!r} has no last word after others")
        return Problem(self.put(layout, before), space + word, word, (space + word,))

    def judge(self, scores: Sequence[Score], problem: Problem) -> dict[str, bool]:
        return {"last word": scores[0].greedy}
