"""The task for rows of one's own: an answer is right if it is the row's, letter by letter."""

import re

from ..data.templates import segments
from ..errors import UserError
from .task import AnswerTask, Problem, Row, behind, put, text_of


class Exact(AnswerTask):
    """strict: the same text except for space at its ends; flexible: also except for case, spacing and a final . ! ?"""

    layout, measures = "", ("strict", "flexible")

    def problem(self, row: Row, layout: str) -> Problem:
        if layout:
            solution = text_of(row, "answer", "response", "output", "completion", "solution")
            question = text_of(row, "question", "query", "instruction", "prompt", "problem")
            return Problem(put(layout, question), behind(solution), solution.strip())
        parts = segments(row)
        # in a chat the blank line after an answer counts too, and so does the next speaker's name; neither is an answer
        answers = [n for n in range(1, len(parts)) if parts[n][1] and not parts[n - 1][1]]
        if not answers:
            raise UserError("the row is one text, with no question before an answer")
        first, *rest = parts[answers[-1] :]
        solution = "".join([first[0], *(text for text, _ in rest if all(counts for _, counts in rest))])
        return Problem("".join(text for text, _ in parts[: answers[-1]]), solution, solution.strip())

    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        return {"strict": text.strip() == problem.answer, "flexible": plain(text) == plain(problem.answer)}


def plain(text: str) -> str:
    return re.sub(r"[\s.!?]+$", "", " ".join(text.casefold().split()))
