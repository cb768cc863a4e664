"""A row as a mapping that records which of its fields a layout reads, so that no field's text is lost in silence."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..cli.errors import UserError, quoted, short, some

NUMBERED = re.compile(r"\d|://")  # in a single word: an id, a date, a version or a link
LETTER = re.compile(r"[^\W\d_]")
BEGINNING = 30  # characters of a value that a message shows


class UnknownForm(UserError):
    """A row has none of the fields that are looked for."""


class Fields(dict[str, Any]):
    """A row. `read` has the names of the fields that were looked up by [] or get; `|` and `without` share it."""

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
        """The value of a field, which does not count as read, or None."""
        return super().get(name)

    def __or__(self, more: Mapping[str, Any]) -> "Fields":  # type: ignore[override]
        return Fields({**self, **more}, self.read)

    def without(self, *names: str) -> "Fields":
        return Fields({name: value for name, value in self.items() if name not in names}, self.read)

    def holds(self, *names: str) -> bool:
        """Return whether all these fields hold something; they do not count as read."""
        return all(map(self.peek, names))

    def unread(self) -> Iterator[str]:
        """Yield the names of the fields that hold words and were not read."""
        for name, value in self.items():
            if name not in self.read and has_words(value):
                yield name


def fields_of(row: object, forms: str) -> Fields:
    """The row as Fields, or itself if it is that. Raises UserError with the known forms if it is no object."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields: {forms}")
    return row if isinstance(row, Fields) else Fields(row)


def has_words(value: object) -> bool:
    """Return whether a value is, or holds, a text with a letter; a single ASCII word with a digit or :// is an id, a
    date or a link, and no text."""
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


def shown(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, each with the beginning of its value."""
    return some([f"{name} {beginning(value)}" for name, value in row.items()], 20) or "(none)"


def beginning(value: object) -> str:
    if isinstance(value, dict):
        return "{…}"
    if isinstance(value, list):
        return "[…]"
    return quoted(value[:BEGINNING]) + "…" * (len(value) > BEGINNING) if isinstance(value, str) else short(str(value))


def unknown(row: Mapping[str, Any], words: str) -> UnknownForm:
    return UnknownForm(f"a row has the fields {shown(row)}; {words}")


def require_field(row: Fields, name: str) -> Fields:
    """The row itself. Raises UserError if it lacks a field."""
    if name not in row:
        raise UnknownForm(f"field {name!r} is missing; the row has {shown(row)}")
    return row
