"""Lays out a row as a prompt that the model in training answers: the text up to the point where its answer opens."""

from collections.abc import Sequence
from types import MappingProxyType

from ..errors import UserError
from .pairs import PROMPTS, TURNS, answers
from .templates import UnknownForm, behind_system, named_segments, segments
from .turns import Segment, chat

FORMS = (
    "a prompt, query, question or instruction (and input), or messages; an answer beside them is not read, but by what "
    "judges the model's"
)
# think -> an answer to lay out, in the place of the one that the model will give
STAND_IN = MappingProxyType({"": ".", "off": ".", "on": "<think>.</think>."})


def opened(row: object, names: Sequence[str] = (), think: str = "") -> list[Segment]:
    """Lay out a row (dict) as the segments of its prompt, none of which counts in the loss. names is the field of the
    prompt, if it is given; think is as in `segments`, but "on" asks every row for thinking. Raises UserError for a row
    of no known form, and for an empty prompt."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields: {FORMS}")
    words, fields = STAND_IN[think], ", ".join(map(str, row)) or "(none)"
    turns = next((row[name] for name in TURNS if isinstance(row.get(name), list)), None)
    question = next((name for name in PROMPTS if name in row), None)
    if names and names[0] not in row:
        raise UnknownForm(f"field {names[0]!r} is missing; the row has {fields}")
    if names:
        parts = named_segments({**row, "": words}, (names[0], ""), think)
    elif turns is not None:
        before = turns[:-1] if turns and answers(turns[-1]) else turns
        parts = behind_system(row, chat([*before, {"role": "assistant", "content": words}], think))
    elif question is not None:
        rest = {name: value for name, value in row.items() if name != "text"}
        parts = segments({**rest, PROMPTS[question]: words}, think)
    else:
        raise UnknownForm(f"a row has the fields {fields}; prompts are {FORMS}")
    *prompt, _ = parts
    if not any(text.strip() for text, _ in prompt):
        raise UserError("the prompt is empty; write one, or leave the row out")
    return [(text, False) for text, _ in prompt]
