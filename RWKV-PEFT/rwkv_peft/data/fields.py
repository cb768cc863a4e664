"""The fields of a row: which were read, so that no text is lost in silence, and how a value becomes text."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..cli.errors import UserError, quoted, short, some

LISTS = ("tools", "functions")  # fields of a row, or of a system turn, that list tools
CALLS = ("tool_calls", "function_call")  # fields of a turn that hold its calls
PLACED = (*LISTS, *CALLS, "history")  # fields of a row that a layout has to read
MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))  # fields of a row, or of a turn
NOTHING: tuple[object, ...] = (None, "", [], {}, "[]", "{}", "null")
NUMBERED = re.compile(r"\d|://")  # in a single word: an id, a date, a version or a link
LETTER = re.compile(r"[^\W\d_]")
BEGINNING = 30  # characters of a value in a message


class UnknownForm(UserError):
    """A row has none of the fields of any layout."""


class Fields(dict[str, Any]):
    """A row that records in `read` the fields looked up by [] or get; copies by `|` and `without` share that set."""

    def __init__(self, row: Mapping[str, Any], read: set[str] | None = None) -> None:
        super().__init__(row)
        self.read = set[str]() if read is None else read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def peek(self, name: str) -> Any:
        """The value of a field, or None; the field does not count as read."""
        return super().get(name)

    def __or__(self, more: Mapping[str, Any]) -> "Fields":  # type: ignore[override]
        return Fields({**self, **more}, self.read)

    def without(self, *names: str) -> "Fields":
        return Fields({name: value for name, value in self.items() if name not in names}, self.read)

    def holds(self, *names: str) -> bool:
        """True if all these fields hold something; they do not count as read."""
        return all(map(self.peek, names))

    def unread(self) -> Iterator[str]:
        """Yield the names of the fields that hold words and were not read."""
        for name, value in self.items():
            if name not in self.read and has_words(value):
                yield name


def fields_of(row: object, forms: str) -> Fields:
    """A row as Fields. Raises UserError with the known forms if it is no object."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields: {forms}")
    return row if isinstance(row, Fields) else Fields(row)


def field(row: Mapping[str, Any], name: str) -> str:
    """The text row[name]; a finite number is its digits. Raises UserError for any other value."""
    value = row[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"field {name!r} holds {type(value).__name__}, not text")
    return value


def require_field(row: Fields, name: str) -> Fields:
    """The row itself. Raises UnknownForm if it lacks a field."""
    if name not in row:
        raise UnknownForm(f"field {name!r} is missing; the row has {shown(row)}")
    return row


def refuse_unplaced(row: Fields) -> None:
    """Raise UserError if a row holds one of PLACED that its layout has not read, or a picture, a film or a sound."""
    refuse_media(row)
    for name in row:
        if name in PLACED and name not in row.read and row.peek(name) not in NOTHING:
            remedy = "earlier turns belong into messages" if name == "history" else "write it out in the turns' words"
            raise UserError(
                f"field {name!r} has no place in this layout; {remedy}, or remove the field if it should not be learned"
            )


def refuse_media(holder: Mapping[str, Any]) -> None:
    """Raise UserError if a row or a turn holds one of MEDIA."""
    for name, value in holder.items():
        if name in MEDIA and value not in NOTHING:
            raise UserError(
                f"field {name!r} is no text, and only text is read; leave such rows out, or remove the field if their "
                "words do without it"
            )


def unknown(row: Mapping[str, Any], words: str) -> UnknownForm:
    return UnknownForm(f"a row has the fields {shown(row)}; {words}")


def shown(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, each with the beginning of its value."""
    return some([f"{name} {beginning(value)}" for name, value in row.items()], 20) or "(none)"


def beginning(value: object) -> str:
    if isinstance(value, dict):
        return "{…}"
    if isinstance(value, list):
        return "[…]"
    return quoted(value[:BEGINNING]) + "…" * (len(value) > BEGINNING) if isinstance(value, str) else short(str(value))


def has_words(value: object) -> bool:
    """True if a value is, or holds, a text with a letter that is not a single ASCII word with a digit or ://, as ids,
    dates and links are."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str) and LETTER.search(one):
            single = one.isascii() and len(one.split(None, 1)) == 1
            if not (single and NUMBERED.search(one)):
                return True
    return False
