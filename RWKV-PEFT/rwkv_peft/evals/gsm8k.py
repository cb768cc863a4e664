"""The task for problems with a number as the answer: GSM8K's rows, and MetaMath's of that kind."""

from ..errors import UserError, short
from .numbers import flexible_number, numbers_in, strict_number
from .task import AnswerTask, Problem, Row, behind, put, text_of


class Gsm8k(AnswerTask):
    """strict: the number after #### or "The answer is" is right; flexible: the last number of the answer is."""

    layout, measures = "chat", ("strict", "flexible")

    def problem(self, row: Row, layout: str) -> Problem:
        solution = text_of(row, "answer", "response", "solution")
        value = strict_number(solution)
        if value is None and len(found := numbers_in(solution)) == 1:
            value = found[0]
        if value is None:
            raise UserError(f"its answer {short(solution)!r} has no number after #### or 'The answer is'")
        return Problem(put(layout, text_of(row, "question", "query", "problem")), behind(solution), str(value))

    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        found = {"strict": strict_number(text), "flexible": flexible_number(text)}
        return {name: value is not None and str(value) == problem.answer for name, value in found.items()}
