"""Find final answers in LaTeX and compare their meaning, by the package math-verify."""

import importlib.util

from ..errors import UserError
from .numbers import marked


def require_math_verify() -> None:
    """Raise UserError if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "math needs the package math-verify, which tells whether two answers mean the same; pip install -r "
            "requirements-eval.txt (or pip install math-verify)"
        )


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{…}, nested braces included; None if there is none or it is not closed."""
    start = text.rfind("\\boxed{")
    depth = 0
    for position in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position].strip()
    return None


def final_answer(text: str) -> str | None:
    """The final answer of a solution: in the last box, else after a marker such as "The answer is"; None without
    either."""
    inside = boxed(text)
    told = marked(text) if inside is None else inside
    return told.removesuffix(".").strip("$") if told else None


def same_answer(given: str, gold: str) -> bool:
    """Tell whether two answers in LaTeX, without their dollar signs, mean the same."""
    if "".join(given.split()) == "".join(gold.split()):
        return True
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(f"${given}$")))


def same_anywhere(text: str, gold: str) -> bool:
    """Tell whether the last formula or number that math-verify finds in a text means the same as gold."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(text)))
