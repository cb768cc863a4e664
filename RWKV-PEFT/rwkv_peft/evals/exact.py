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
        # behind an answer of a chat the blank line counts, too, and the name of who speaks then
        answers = [n for n in range(1, len(parts)) if parts[n][1] and not parts[n - 1][1]]
        if not answers:
            raise UserError("the row is one text, with no question before an answer")
        solution = parts[answers[-1]][0]
        return Problem("".join(text for text, _ in parts[: answers[-1]]), solution, solution.strip())

    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        return {"strict": text.strip() == problem.answer, "flexible": plain(text) == plain(problem.answer)}


def plain(text: str) -> str:
    return re.sub(r"[\s.!?]+$", "", " ".join(text.casefold().split()))
