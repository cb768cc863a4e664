"""The fields of a row: their values as text, and those in no document, so that no text is lost in silence."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..cli.errors import UserError, quoted, short, some
from ..cli.names import is_finite

Row = Mapping[str, Any]
LISTS = ("tools", "functions")  # fields of a row, or of a system turn, that list tools
CALLS = ("tool_calls", "function_call")  # fields of a turn that hold its calls
PLACED = (*LISTS, *CALLS, "history")  # fields of a row that a layout has to read
MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))  # fields of a row, or of a turn
NOTHING: tuple[object, ...] = (None, "", [], {}, "[]", "{}", "null")
ROLES = ("role", "from", "speaker", "sender", "author")  # names of the field of a turn's speaker
BEGINNING = 30  # characters of a value in a message


class UnknownForm(UserError):
    """A row has none of the fields of any form, or those of two; `choices` are fields to name instead."""

    def __init__(
        self, message: str, choices: Sequence[Sequence[str]] = (), offers: Iterable[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message, offers=[*offers, *(("sft_field", " ".join(names)) for names in choices)])
        self.choices = choices


def json_kind(value: object) -> str:
    """The kind of a value, in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if is_finite(value) else "no finite number")


def require_object(row: object, forms: str) -> dict[str, Any]:
    """The row itself. Raises UserError with the known forms if it is no object."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {json_kind(row)}, not an object with fields: {forms}")
    return row


def field(row: Row, name: str) -> str:
    """The text row[name]; a number that a float can hold is its digits. Raises UserError for any other value."""
    value = row[name]
    if is_finite(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"field {name!r} holds {json_kind(value)}, not text")
    return value


def require_field(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row itself. Raises UnknownForm if it lacks a field."""
    if name not in row:
        raise UnknownForm(f"field {name!r} is missing; the row has {shown(row)}")
    return row


def holds(row: Row, *names: str) -> bool:
    """True if all these fields hold something."""
    return all(map(row.get, names))


def without(row: Row, *names: str) -> dict[str, Any]:
    """A row's other fields."""
    return {name: value for name, value in row.items() if name not in names}


def refuse_unplaced(row: Row, placed: str = "") -> None:
    """Raise UserError if a row holds one of PLACED but `placed`, or a picture, a film or a sound."""
    refuse_media(row)
    for name in row:
        if name in PLACED and name != placed and row[name] not in NOTHING:
            remedy = "earlier turns belong into messages" if name == "history" else "write it out in the turns' words"
            raise UserError(
                f"field {name!r} has no place in this layout; {remedy}, or remove the field if it should not be learned"
            )


def refuse_media(holder: Row) -> None:
    """Raise UserError if a row or a turn holds one of MEDIA."""
    for name, value in holder.items():
        if name in MEDIA and value not in NOTHING:
            raise UserError(
                f"field {name!r} is no text, and only text is read; leave such rows out, or remove the field if their "
                "words do without it"
            )


def unknown(row: Row, words: str) -> UnknownForm:
    return UnknownForm(f"a row has the fields {shown(row)}; {words}")


def shown(row: Row) -> str:
    """The names of a row's fields, each with the beginning of its value."""
    return some([f"{name} {beginning(value)}" for name, value in row.items()], 20) or "(none)"


def beginning(value: object) -> str:
    if isinstance(value, dict):
        return "{…}"
    if isinstance(value, list):
        return "[…]"
    return quoted(value[:BEGINNING]) + "…" * (len(value) > BEGINNING) if isinstance(value, str) else short(str(value))


def unread(row: Row, document: str, read: Container[str]) -> Iterator[str]:
    """Yield the names of the fields, but those in `read`, that hold something which is not in the document, but for
    spaces and a thinking. Of several texts in a list or an object the longest stands for all."""
    for name, value in row.items():
        if name not in read:
            text = value if isinstance(value, str) else max(texts_in(value), key=len, default="")
            text = text.rpartition("</think>")[2].strip()
            if text not in document and (" " not in text or joined(text) not in joined(document)):
                yield name


def joined(text: str) -> str:
    """A text without spaces and line ends."""
    return "".join(text.split())


def texts_in(value: object) -> Iterator[str]:
    """Yield the texts and numbers that a value is or holds, as texts."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [part for name, part in one.items() if name not in ROLES]
        elif isinstance(one, list):
            left += one
        elif one is not None:
            yield json.dumps(one) if isinstance(one, bool) else str(one)  # a table's may also be a date
