"""Lays out a row of a prompt, one answer and its label, true for a desirable answer, as the text of a document."""

from collections.abc import Sequence

from ..errors import UserError, short
from .pairs import TURNS, answers, behind, turns
from .templates import UnknownForm, behind_system, named_segments, segments
from .turns import Segment

LABEL, ANSWER = "label", "completion"
UNDESIRABLE = 2  # in a .mask: the token counts, in an answer that is labelled undesirable
FORMS = (
    "label (true or false) beside a prompt and its completion, a query and response, a question and answer, an "
    "instruction and output; beside messages that end in the answer; or beside messages, or a list as prompt, and a "
    "completion behind them"
)


def labelled(row: object, names: Sequence[str] = (), think: str = "") -> list[Segment]:
    """Lay out a row (dict) as the segments of its prompt and its answer; of a chat only the last answer counts. names
    are the fields of prompt, answer and label, if they are given; think is as in `segments`."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields: {FORMS}")
    label = names[2] if names else LABEL
    if label not in row:
        raise UnknownForm(
            f"a row has the fields {', '.join(map(str, row)) or '(none)'}; labelled rows have {FORMS}; rows without a "
            "label are for --data_type sft"
        )
    if names:
        return named_segments(row, names[:2], think)
    before = next((row[name] for name in TURNS if isinstance(row.get(name), list)), None)
    if before is None and isinstance(row.get(ANSWER, ""), str):
        return segments({name: value for name, value in row.items() if name != label}, think)
    conversation = turns(row, before, row[ANSWER]) if ANSWER in row else before or []
    if len(conversation) < 2 or not answers(conversation[-1]):
        raise UserError("the turns of a labelled row are to end in one of the assistant's, which the label judges")
    return behind_system(row, behind(conversation, len(conversation) - 1, think))


def label_of(row: object, names: Sequence[str]) -> bool:
    """The label of a row that `labelled` lays out. Raises UserError for anything but true and false."""
    name = names[2] if names else LABEL
    value = row[name] if isinstance(row, dict) else None
    if not isinstance(value, bool):
        raise UserError(
            f"field {name!r} holds {short(repr(value))}; a label is true for a desirable answer, or false for an "
            "undesirable one"
        )
    return value
