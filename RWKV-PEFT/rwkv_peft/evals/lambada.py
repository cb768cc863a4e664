"""LAMBADA (Paperno et al. 2016, arXiv 1606.06031): guess the last word of a passage, which takes the whole passage."""

from collections.abc import Sequence

from ..errors import UserError, short
from .task import ChoiceTask, Problem, Row, Score, put, text_of


class Lambada(ChoiceTask):
    """last word: right if each of its tokens is the most probable one; its perplexity is reported as well."""

    layout, measures = "plain", ("last word",)

    def problem(self, row: Row, layout: str) -> Problem:
        text = text_of(row, "text").strip()
        before, space, word = text.rpartition(" ")
        if not before.strip():
            raise UserError(f"the text {short(text)!r} has no last word after others")
        return Problem(put(layout, before), space + word, word, (space + word,))

    def judge(self, scores: Sequence[Score], problem: Problem) -> dict[str, bool]:
        return {"last word": scores[0].greedy}
