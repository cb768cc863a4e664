"""Describes an adapter's training to people, in an entry of its own in the file's header; no result depends on it.
Files of earlier versions lack it, and earlier versions read files that have it."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import UserError

ENTRY = "rwkv_peft_run"
MOST = 1000  # characters of a text


@dataclass(frozen=True)
class Origin:
    """The base's file name (base), the flags that say how the data was read (data), the learning rate (rate), and so
    on; "": unknown."""

    base: str = ""
    tokenizer: str = ""
    data: str = ""
    rate: str = ""
    versions: str = ""

    def to_json(self) -> str:
        return json.dumps({name: shown(text) for name, text in asdict(self).items()}, sort_keys=True)


def shown(text: str) -> str:
    """Make a text printable and at most MOST long: names of files and fields may hold any character."""
    return "".join(character if character.isprintable() else "?" for character in text)[:MOST]


def read_origin(path: str | Path, header: dict[str, str]) -> Origin:
    """Read the Origin in a file's header, empty if there is none. Raises UserError if an entry is not printable text of
    at most MOST characters."""
    try:
        told = json.loads(header.get(ENTRY, "{}"))
        values = {field.name: told.get(field.name, "") for field in fields(Origin)}
    except (ValueError, AttributeError, RecursionError):
        values = {ENTRY: None}
    if not all(isinstance(text, str) and text.isprintable() and len(text) <= MOST for text in values.values()):
        raise UserError(f"{path}: {ENTRY} in its header is damaged; copy the file that the training wrote")
    return Origin(**values)
