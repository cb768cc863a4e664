"""Texts in other encodings than UTF-8, and files that hold several documents."""

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ..cli.errors import UserError, in_line, quoted
from ..cli.names import DOCUMENT_ENDS
from ..cli.parser import counted
from .containers import BLOCK, buffered

MARKS = (  # byte order marks, the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
GUESSED = 1 << 16  # bytes by which an encoding is guessed
ROWS, BYTES = 2000, 4 << 20  # of a sample
ENDS = MappingProxyType(
    dict(zip(DOCUMENT_ENDS, (r"<\|endoftext\|>", r"^[ \t]*(?:\*[ \t]*){3,}$", r"^---+[ \t]*$"), strict=True))
)
SHOWN = MappingProxyType(dict(zip(ENDS, ("<|endoftext|>", "a line of ***", "a line of ---"))))


@dataclass(frozen=True)
class Reading:
    """How files are read: the encoding of texts ("": found), the mark of DOCUMENT_ENDS at which a text is cut, and the
    notes on what was found, which readers add to. A `sample` is the beginning alone: ROWS rows, BYTES of a text."""

    encoding: str = ""
    document_end: str = ""
    sample: bool = False
    notes: list["Note"] = field(default_factory=list, compare=False)

    def note(self, words: str, *offers: tuple[str, str]) -> None:
        self.notes.append(Note(words, offers))


class Note(NamedTuple):
    """A line on what was read, and flags of train.py with values that would change it."""

    words: str
    offers: tuple[tuple[str, str], ...] = ()


def in_utf8(file: io.BufferedReader, path: Path, how: Reading, by_line: bool = False) -> io.BufferedReader:
    """A file's bytes in UTF-8: by its byte order mark, or else the encoding that is named, or UTF-8, or a guess.
    Without one it is the file itself if each line is judged `by_line`."""
    start = file.peek(BLOCK)
    encoding = next((name for mark, name in MARKS if start.startswith(mark)), how.encoding)
    if not encoding and not is_utf8(start):
        try:
            encoding = guess(start, path)
        except UserError:
            if by_line:
                return file
            raise
        shown = in_line(quoted(start[:GUESSED].decode(encoding, "replace").partition("\n")[0]))
        how.note(f"{path} is read as {encoding}; its first line: {shown}; --encoding names another")
    return buffered(recoded(file, encoding, path)) if encoding not in ("", "utf-8") else file


def is_utf8(start: bytes) -> bool:
    """True for bytes in UTF-8. A few may be damaged, and the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        text = start.decode("utf-8", "replace")
        return 3 * text.count("\ufffd") < sum(letter > "\x7f" for letter in text)
    return True


def guess(start: bytes, path: Path) -> str:
    """charset-normalizer's best guess at the encoding of a text's first bytes. Raises UserError if it has none or saw
    no language in the text, and for encodings of single bytes, because any of them decodes any text."""
    from charset_normalizer import from_bytes
    from charset_normalizer.utils import is_multi_byte_encoding

    sample = start[:GUESSED]
    best = from_bytes(sample[: sample.rfind(b"\n") + 1] or sample).best()
    if best is not None and is_multi_byte_encoding(best.encoding) and best.coherence > 0:
        return best.encoding
    name = best.encoding if best is not None else "cp1252"
    line = next((line for line in sample.splitlines() if not line.isascii()), sample)
    raise UserError(
        f"{path}: not UTF-8, and too little to tell its encoding by: name it (--encoding {name} would read "
        f"{quoted(line.decode(name, 'replace'))}; gb18030, big5, shift_jis, cp1252 are others), or convert the file"
    )


def recoded(file: io.BufferedReader, encoding: str, path: Path) -> Iterator[bytes]:
    """Yield the blocks of a file in UTF-8, and close it."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with file:
        try:
            while block := file.read(BLOCK):
                yield decoder.decode(block).encode()
            yield decoder.decode(b"", final=True).encode()
        except UnicodeError as error:
            raise UserError(f"{path}: not {encoding} ({error}); --encoding names its encoding") from error


def documents(text: str, path: Path, how: Reading) -> list[str]:
    """The documents of a text: itself, or its parts between the marks that end documents, if they are named."""
    if how.document_end:
        parts = re.split(ENDS[how.document_end], text, flags=re.MULTILINE)
        return [part.strip() + "\n" for part in parts if part.strip()]
    for name, mark in ENDS.items():
        if number := len(re.findall(mark, text, re.MULTILINE)):
            how.note(
                f"{path} is one document, and holds {SHOWN[name]} {counted(number, 'time')}; --document_end {name} "
                "makes a document of each part",
                ("document_end", name),
            )
    return [text]
