"""Find numbers in text as people and models write them: 1,234; $5.00; 3/4; \\frac{3}{4}; 50%; -7 apples."""

import re
from fractions import Fraction

DIGITS = 1000  # digits of a number that are read: no answer has as many, and Python converts at most 4,300
# the marker before a final answer: GSM8K's sign, or MetaMath's words
MARKER = re.compile(r"####|[Tt]he (?:final )?answer is:?")
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)}\]])[-\u2212])?(?:\\?\$\s?(?P<inner>[-\u2212])?)?"
    r"(?:\\[dt]?frac\s?\{(?P<over>-?\d+)\}\s?\{(?P<under>\d+)\}"
    r"|(?P<whole>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?(?P<by>\d+)(?![\d.]))?)"
)


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text, in order. Units and percent signs are ignored, and fractions over 0 are left out."""
    found = (value_of(match) for match in NUMBER.finditer(text))
    return [value for value in found if value is not None]


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
    found = numbers_in(marked(text) or "")
    return found[0] if found else None


def flexible_number(text: str) -> Fraction | None:
    """The last number of the text; None if there is none."""
    found = numbers_in(text)
    return found[-1] if found else None
