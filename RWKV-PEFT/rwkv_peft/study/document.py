"""Reads a document, and cuts it into parts of so many tokens at most."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from ..files.readable import require_readable

MOST = 1 << 24  # bytes of a document
BORDERS = ("\n\n", "\n", ". ", " ", "")  # where to cut, the best places first


def read_document(path: str) -> str:
    """The text of a document. Raises UserError for one that cannot be read, is too long, or holds no words."""
    missing = f"{path}: no such file; the first word names the document, which is a text"
    file = require_readable(path, missing)
    content = file.read_bytes() if (size := Path(path).stat().st_size) <= MOST else b""
    if size > MOST:
        raise UserError(f"{path} has {size:,} bytes, and a document {MOST:,} at most; study it in several pieces")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}); a document is a text: convert it") from error
    if not text.strip():
        raise UserError(f"{path} holds no words, so that there is nothing to learn; name another document")
    return text


def cut(text: str, most: int, length: Callable[[str], int]) -> list[str]:
    """Cut a text into parts of a length of `most`, at the ends of paragraphs, or else of lines, sentences and words."""
    return [part.strip() for part in joined(pieces(text, most, length, BORDERS), most, length) if part.strip()]


def pieces(text: str, most: int, length: Callable[[str], int], borders: Sequence[str]) -> Iterator[str]:
    """Yield pieces that make up a text, none longer than `most` if a border within allows it."""
    if not borders or length(text) <= most:
        yield text
        return
    border, *others = borders
    *words, last = text.split(border) if border else list(text)
    for word in [*(word + border for word in words), last]:
        yield from pieces(word, most, length, others)


def joined(parts: Iterator[str], most: int, length: Callable[[str], int]) -> Iterator[str]:
    """Yield consecutive pieces as few texts that are not longer than `most`."""
    whole = ""
    for piece in parts:
        if whole and length(whole + piece) > most:
            yield whole
            whole = ""
        whole += piece
    yield whole
