"""Find final answers in text and compare them: numbers as people and models write them (1,234; $5.00; 3/4;
\\frac{3}{4}; 50%; -7 apples), and LaTeX, by the package math-verify."""

import importlib.util
import re
from fractions import Fraction

from ..cli.errors import UserError
from ..cli.installing import how_to_install

DIGITS = 1000  # digits of a number that are read: a model may repeat one for ever, and Python converts at most 4,300
# the marker before a final answer: GSM8K's sign, or MetaMath's words
MARKER = re.compile(r"####|[Tt]he (?:final )?answer is:?")
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)}\]])[-\u2212])?(?:\\?\$\s?(?P<inner>[-\u2212])?)?"
    r"(?:\\[dt]?frac\s?\{(?P<over>-?\d+)\}\s?\{(?P<under>\d+)\}"
    r"|(?P<whole>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?(?P<by>\d+)(?![\d.]))?)"
)


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text, in order. Units and percent signs are ignored, and fractions over 0 are left out."""
    values = (value_of(match) for match in NUMBER.finditer(text))
    return [value for value in values if value is not None]


def value_of(match: re.Match[str]) -> Fraction | None:
    """The value of a match of NUMBER; None for a fraction over 0."""
    over, under = match["over"] or match["whole"].replace(",", ""), match["under"] or match["by"] or "1"
    divisor = int(under[:DIGITS])
    if divisor == 0:
        return None
    value = Fraction(over[:DIGITS]) / divisor
    return -value if bool(match["sign"]) != bool(match["inner"]) else value


def marked(text: str) -> str | None:
    """The text after the last marker of a final answer, up to the end of its line; None without a marker."""
    ends = [match.end() for match in MARKER.finditer(text)]
    return text[ends[-1] :].lstrip(" *").split("\n")[0].strip() if ends else None


def strict_number(text: str) -> Fraction | None:
    """The first number after the last marker, on its line; None if there is none."""
    numbers = numbers_in(marked(text) or "")
    return numbers[0] if numbers else None


def flexible_number(text: str) -> Fraction | None:
    """The last number of the text; None if there is none."""
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "math needs the package math-verify, which tells whether two answers mean the same; "
            + how_to_install("eval")
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
    """The final answer of a solution, in the last box, else after a marker ("The answer is"); None without either."""
    inside = boxed(text)
    found = marked(text) if inside is None else inside
    return found.removesuffix(".").strip("$") if found else None


def same_answer(given: str, gold: str) -> bool:
    """True if two answers in LaTeX, without their dollar signs, mean the same."""
    if "".join(given.split()) == "".join(gold.split()):
        return True
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(f"${given}$")))


def same_anywhere(text: str, gold: str) -> bool:
    """True if the last formula or number that math-verify finds in a text means the same as gold."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(text)))
