"""Rows of one's own: is the answer the row's, letter by letter?"""

import re

from ..data.templates import segments
from ..errors import UserError
from .task import AnswerTask, Problem, Row, behind, put, text_of


class Exact(AnswerTask):
    """strict: the same letters, but for space at the ends; flexible: case, spacing and punctuation at the end aside."""

    layout, measures = "", ("strict", "flexible")

    def problem(self, row: Row, layout: str) -> Problem:
        if layout:
            solution = text_of(row, "answer", "response", "output", "completion", "solution")
            question = text_of(row, "question", "query", "instruction", "prompt", "problem")
            return Problem(put(layout, question), behind(solution), solution.strip())
        parts = segments(row)
        last = max((number for number, (_, counts) in enumerate(parts) if counts), default=0)
        if last == 0:
            raise UserError("the row is one text, with no question before an answer")
        solution = parts[last][0]
        return Problem("".join(text for text, _ in parts[:last]), solution, solution.strip())

    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        return {"strict": text.strip() == problem.answer, "flexible": plain(text) == plain(problem.answer)}


def plain(text: str) -> str:
    return re.sub(r"[\s.!?]+$", "", " ".join(text.casefold().split()))
