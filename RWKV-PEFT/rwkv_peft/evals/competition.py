"""The task for problems with a formula as the answer: MATH's rows, and MetaMath's of that kind."""

from ..errors import UserError, short
from .equivalence import final_answer, require_math_verify, same_answer, same_anywhere
from .task import AnswerTask, Problem, Row, behind, put, text_of


class Competition(AnswerTask):
    """strict: the formula in the last box, or after "The answer is", is right; flexible: that or the last formula or
    number is."""

    layout, measures = "chat", ("strict", "flexible")
    require = staticmethod(require_math_verify)

    def problem(self, row: Row, layout: str) -> Problem:
        question = text_of(row, "problem", "question", "query")
        solution = text_of(row, "solution", "response", "answer")
        told = text_of(row, "answer") if "solution" in row and "answer" in row else final_answer(solution)
        if not told:
            raise UserError(f"its solution {short(solution)!r} has no \\boxed{{answer}}, nor 'The answer is'")
        return Problem(put(layout, question), behind(solution), told)

    def judge(self, text: str, problem: Problem) -> dict[str, bool]:
        given = final_answer(text)
        strict = given is not None and same_answer(given, problem.answer)
        return {"strict": strict, "flexible": strict or same_anywhere(text, problem.answer)}
