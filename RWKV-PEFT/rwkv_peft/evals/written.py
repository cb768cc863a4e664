"""Tasks whose answers the model writes: numbers, formulas, and rows of one's own."""

import re

from ..data.templates import UnknownForm, segments
from ..errors import UserError, short
from .numbers import (
    final_answer,
    flexible_number,
    numbers_in,
    require_math_verify,
    same_answer,
    same_anywhere,
    strict_number,
)
from .task import AnswerTask, Problem, Row, behind, text_of


class Gsm8k(AnswerTask):
    """Problems with a number as the answer: GSM8K's rows, and MetaMath's of that kind. strict: the number after #### or
    "The answer is" is right; flexible: the last number of the answer is."""

    layout, measures = "chat", ("strict", "flexible")

    def problem(self, row: Row, layout: str) -> Problem:
        solution = text_of(row, "answer", "response", "solution")
        value = strict_number(solution)
        if value is None and len(found := numbers_in(solution)) == 1:
            value = found[0]
        if value is None:
            raise UserError(f"its answer {short(solution)!r} has no number after #### or 'The answer is'")
        question = text_of(row, "question", "query", "problem")
        return Problem(self.put(layout, question), behind(solution), str(value))

    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        found = {"strict": strict_number(text), "flexible": flexible_number(text)}
        return {name: value is not None and str(value) == problem.answer for name, value in found.items()}


class Exact(AnswerTask):
    """Rows of one's own: an answer is right if it is the row's, letter by letter. strict: the same text except for
    space at its ends; flexible: also except for case, spacing and a final . ! ?"""

    layout, measures = "", ("strict", "flexible")

    def problem(self, row: Row, layout: str) -> Problem:
        if layout:
            solution = text_of(row, "answer", "response", "output", "completion", "solution")
            question = text_of(row, "question", "query", "instruction", "prompt", "problem")
            return Problem(self.put(layout, question), behind(solution), solution.strip())
        try:
            parts = segments(row, clean=self.clean)
        except UnknownForm as error:
            raise UserError(f"{error}; give the fields such names") from error
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


class Competition(AnswerTask):
    """Problems with a formula as the answer: MATH's rows, and MetaMath's of that kind. strict: the formula in the last
    box, or after "The answer is", is right; flexible: that or the last formula or number is."""

    layout, measures = "chat", ("strict", "flexible")
    require = staticmethod(require_math_verify)

    def problem(self, row: Row, layout: str) -> Problem:
        question = text_of(row, "problem", "question", "query")
        solution = text_of(row, "solution", "response", "answer")
        told = text_of(row, "answer") if "solution" in row and "answer" in row else final_answer(solution)
        if not told:
            raise UserError(f"its solution {short(solution)!r} has no \\boxed{{answer}}, nor 'The answer is'")
        return Problem(self.put(layout, question), behind(solution), told)

    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        given = final_answer(text)
        strict = given is not None and same_answer(given, problem.answer)
        return {"strict": strict, "flexible": strict or same_anywhere(text, problem.answer)}
