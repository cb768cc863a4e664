"""How an adapter came to be, in words for people: an entry of its own in a file's header, which decides nothing. Files
of earlier versions lack it, and earlier versions read files that have it."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import UserError

ENTRY = "rwkv_peft_run"
MOST = 1000  # characters of a text


@dataclass(frozen=True)
class Origin:
    """base is the name of the base's file, data the flags that say how the data was read, rate that of learning; "":
    not told."""

    base: str = ""
    tokenizer: str = ""
    data: str = ""
    rate: str = ""
    versions: str = ""

    def to_json(self) -> str:
        return json.dumps({name: shown(text) for name, text in asdict(self).items()}, sort_keys=True)


def shown(text: str) -> str:
    """A text as it may be printed: names of files and fields may hold any character."""
    return "".join(character if character.isprintable() else "?" for character in text)[:MOST]


def read_origin(path: str | Path, header: dict[str, str]) -> Origin:
    """The Origin in a file's header, empty if there is none. Raises UserError for one that is no text for people."""
    try:
        told = json.loads(header.get(ENTRY, "{}"))
        values = {field.name: told.get(field.name, "") for field in fields(Origin)}
    except (ValueError, AttributeError, RecursionError):
        values = {ENTRY: None}
    if not all(isinstance(text, str) and text.isprintable() and len(text) <= MOST for text in values.values()):
        raise UserError(f"{path}: {ENTRY} in its header is damaged; copy the file that the training wrote")
    return Origin(**values)
