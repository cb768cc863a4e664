"""What the beginning of a file of rows says of how it may be read, for a page on which people choose."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ..cli.errors import UserError
from .columns import PEEKED, columns_of, peeked
from .encoding import EncodeSettings, parse
from .exports import chats_in, export_of, speakers_in
from .fields import beginning
from .forms import form_of, unrolled
from .rows import read_rows
from .texts import Reading


@dataclass
class Overview:
    """The first rows of a file: each field with the beginning of its first value; what the fields are `taken` for, as
    {"prompt": "question", "response": "answer"}; and who talks in a dialogue of people, with numbers of messages."""

    fields: dict[str, str] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)


def overview(path: Path, settings: EncodeSettings) -> Overview:
    """The Overview of a file or folder, of as much as can be read; nothing is taken if that is left to the user."""
    found = Overview()
    try:
        how = Reading(settings.encoding, settings.document_end, sample=True)
        rows, items = peeked(read_rows(path, how=how), parse)
        if export := export_of(rows):
            for (name, _), number in speakers_in(islice(chats_in(items, export, parse), PEEKED)).most_common():
                found.names[name] = found.names.get(name, 0) + number
            return found
        for name, value in (pair for row in rows for pair in row.items()):
            found.fields.setdefault(name, beginning(value))
        if settings.fields:
            found.taken = dict(zip(settings.fields[-2:], ("question", "answer")))
        elif columns := columns_of(rows, settings.command, settings.think):
            found.taken = columns.taken
        elif rows and (form := form_of(unrolled(rows[0]))):
            meanings = ("question", "answer") if len(form.fields) == 2 else form.fields
            found.taken = dict(zip(form.fields, meanings)) | {name: name for name in form.beside if name in rows[0]}
    except UserError:
        pass  # reading all rows says why
    return found
