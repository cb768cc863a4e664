"""Lays out a row of a context, a question and its answer as two documents: the context, and the question with its
answer, which alone a student reads."""

from collections.abc import Sequence

from ..errors import UserError
from .pairs import PROMPTS
from .templates import UnknownForm, named_segments, segments
from .turns import TURN_END, Segment, field

CONTEXT, ANSWER = "context", "answer"
FORMS = (
    "context beside a question and answer, a query and response, an instruction and output, a prompt and completion, "
    "or messages"
)


def in_context(row: object, names: Sequence[str] = (), think: str = "") -> list[list[Segment]]:
    """Lay out a row (dict) as the segments of its context, none of which counts in the loss, and of its question and
    answer. names are the fields of context, question and answer, if they are given; think is as in `segments`. Raises
    UserError for a row of no known form, and for one without words in any of the three."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields: {FORMS}")
    name, fields = names[0] if names else CONTEXT, ", ".join(map(str, row)) or "(none)"
    if name not in row:
        raise UnknownForm(f"field {name!r} is missing; the row has {fields}")
    rest = {key: value for key, value in row.items() if key not in (name, "text")}
    question = next((key for key in PROMPTS if key in rest), "")
    if question and ANSWER in rest:  # whatever the question is called
        rest[PROMPTS[question]] = rest.pop(ANSWER) if PROMPTS[question] not in rest else rest[PROMPTS[question]]
    if not names and not any(key in rest for key in ("messages", "conversations", PROMPTS.get(question, ""))):
        raise UnknownForm(f"a row has the fields {fields}; rows with contexts have {FORMS}")
    parts = named_segments(rest, names[1:], think) if names else segments(rest, think)
    for what, texts in (
        ("context", [field(row, name)]),
        ("question", [text for text, counts in parts if not counts]),
        ("answer", [text for text, counts in parts if counts]),
    ):
        if not any(text.strip() for text in texts):
            raise UserError(f"the {what} is empty; write one, or leave the row out")
    return [[(f"{field(row, name).strip()}{TURN_END}", False)], parts]
