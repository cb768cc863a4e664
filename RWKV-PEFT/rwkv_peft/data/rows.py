"""Rows of .jsonl, .json, .csv, .txt and .parquet files, of folders of them and datasets, in chunks of about 1 MB."""

import csv
import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import islice
from pathlib import Path

from ..checkpoints.readable import choice_in, require_readable
from ..cli.errors import UserError, short, told
from .arrow_rows import parquet_rows, saved_rows
from .folders import choose, is_saved, row_files

CHUNK_BYTES = 1 << 20
CHUNK_ROWS = 1000
ROW_BYTES = 1 << 26  # of a line, at most: a few compressed bytes may unpack to any length
KINDS = (
    ".jsonl (or .jsonl.gz), .json, .csv (or .tsv), .txt, .parquet, a folder of .jsonl, .csv, .parquet or .txt files, "
    "or one that datasets.save_to_disk wrote"
)
JSON_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".json")
CSV_ENDINGS = (".csv", ".tsv")
ENDINGS = (*JSON_ENDINGS, *CSV_ENDINGS, ".txt", ".parquet")
Bounds = tuple[str | None, str | None]  # of rows, as --split has them: numbers, or percentages with their sign
TO_UTF_8 = (
    "convert the file to UTF-8: Excel saves as CSV UTF-8, Notepad asks for the encoding, and in a shell `iconv -f GBK "
    "-t UTF-8 OLD > NEW` converts GBK (`-f WINDOWS-1252`: Western Europe's)"
)
UTF_16 = f"UTF-16, and UTF-8 is due; {TO_UTF_8.partition(' (`')[0].replace('GBK', 'UTF-16')}"
STARTS = (  # the first bytes of a file that is named as a text, its kind and the remedy
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
    (b"PK\3\4", "a zip file, as office programs write them, whatever its name; export it as .csv or .txt"),
    (b"PAR1", "a .parquet file; name it so"),
    (b"\x1f\x8b", "compressed by gzip; name it .jsonl.gz, or unpack it"),
    (b"%PDF", "a PDF, whatever its name; export its text as .txt"),
)
DELIMITERS = ",;\t"
MOST_CHARACTERS = 1 << 24  # of a cell: without a bound an unclosed quote would take in all that follows


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one source.

    items are lines of JSON (bytes), rows (dict), UserErrors of rows that cannot be read, or one piece of a text file
    (str); first is the number of the first item, counted from 1; continues is true for a piece that goes on the
    document of the piece before, ends for the last piece of its document.
    """

    source: str
    first: int
    items: tuple[object, ...]
    continues: bool = False
    ends: bool = True

    @property
    def unit(self) -> str:
        """The word for an item in messages."""
        return "line" if self.items and isinstance(self.items[0], bytes) else "row"


def read_chunks(path: str | Path, split: str = "", pieces: bool = False) -> Iterator[Chunk]:
    """Yield the Chunks of one input.

    split selects rows in the form of datasets: "train[:1000]", "[10%:]"; the name matters only in a folder of splits.
    With pieces=True a .txt file comes in pieces, cut at lines that begin with a visible character.
    """
    path = Path(path)
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if not path.is_dir():
        again = suffix in (*CSV_ENDINGS, ".parquet")
        require_readable(path, f"{path}: no such file; inputs are {KINDS}", again)
    if path.is_file():
        refuse_foreign(path)
    name, bounds = parse_split(split)
    if path.is_dir():
        chunks = folder_chunks(path, name)
    elif suffix == ".jsonl.gz":
        chunks = listed_chunks(path, read_lines(gzip.open(path, "rb"), path))
    elif suffix in JSON_ENDINGS:
        chunks = json_chunks(path)
    elif suffix in CSV_ENDINGS:
        chunks = row_chunks(path, csv_rows(path))
    elif suffix == ".txt":
        if bounds:
            raise UserError(f"{path}: a .txt file is one document, which {split!r} does not split")
        chunks = text_chunks(path, pieces)
    elif suffix == ".parquet":
        chunks = listed_chunks(path, parquet_rows(path))
    else:
        raise UserError(f"{path}: inputs are {KINDS}; export a table (.xlsx) as .csv, a document (.docx, .pdf) as .txt")
    try:
        yield from select(chunks, bounds, lambda: read_chunks(path, name)) if bounds else chunks
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); {TO_UTF_8}") from error


def refuse_foreign(path: Path) -> None:
    """Raise UserError for a file named like a text that begins like something else."""
    with open(path, "rb") as file:
        start = file.read(4)
    for first, kind in STARTS:
        if start.startswith(first) and path.suffix not in (".parquet", ".gz"):
            raise UserError(f"{path} is {kind}")


def read_lines(file: BufferedIOBase, path: Path) -> Iterator[list[bytes]]:
    """Yield the lines of an open file in lists of about CHUNK_BYTES, and close it. Raises UserError for a damaged file,
    and for a line beyond ROW_BYTES."""
    lines: list[bytes] = []
    size = number = 0
    try:
        with file:
            while line := file.readline(ROW_BYTES + 1):
                number += 1
                if len(line) > ROW_BYTES:
                    raise UserError(
                        f"{path}, line {number} has more than {ROW_BYTES:,} bytes, which no row may have; split it, or "
                        "give a long text as a .txt"
                    )
                lines.append(line)
                size += len(line)
                if size >= CHUNK_BYTES:
                    yield lines
                    lines, size = [], 0
    except (OSError, EOFError, zlib.error) as error:  # gzip raises another type for each place of damage
        raise UserError(f"{path} cannot be read to its end: {told(error)}; copy it again") from error
    if lines:
        yield lines


def json_chunks(path: Path) -> Iterator[Chunk]:
    """Yield the Chunks of a .json or .jsonl file: a row a line, a list of all rows, or one row over several lines."""
    with open(path, "rb") as file:  # once, because it may be a pipe
        start = file.peek().lstrip(b"\xef\xbb\xbf \t\r\n")
        one = start.partition(b"\n")[0].strip() == b"{"
        if not one and not start.startswith(b"["):
            yield from listed_chunks(path, read_lines(file, path))
            return
        text = file.read()
    try:
        rows = json.loads(text)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        begins = "{, so that it is one row over several lines" if one else "[, so that it is one list of rows"
        raise UserError(
            f"{path} begins with {begins}, and is not JSON ({told(error)}); mend it there (rows stand a line each, or "
            "in one list, with no comma behind the last), or copy it again if its end is missing"
        ) from error
    yield from row_chunks(path, [rows] if one else rows)


def text_chunks(path: Path, pieces: bool) -> Iterator[Chunk]:
    rest: list[str] = []  # what was read since the last cut
    continues, read, most = False, "", 4 * CHUNK_BYTES
    with open(path, encoding="utf-8-sig") as file:
        while pieces and len(read := file.read(most)) == most:
            read += file.readline()  # whole lines, so that the next read begins where a line does
            cut = last_line(read)
            if cut >= 0 and (text := "".join([*rest, read[:cut]])):
                yield Chunk(str(path), 1, (text,), continues, ends=False)
                rest, continues, read = [], True, read[cut:]
            rest.append(read)
            read = ""
        yield Chunk(str(path), 1, ("".join(rest) + read + file.read(),), continues)


def last_line(text: str) -> int:
    """The position of the last line of a text that begins with a visible character, -1 if none does."""
    end = len(text)
    while end:
        start = text.rfind("\n", 0, end - 1) + 1
        if not text[start].isspace():
            return start
        end = start
    return -1


def folder_chunks(path: Path, name: str) -> Iterator[Chunk]:
    if is_saved(path):
        yield from listed_chunks(path, saved_rows(path, name))
    elif splits := row_files(path):
        for file in splits[choose(splits, name, path)]:
            yield from read_chunks(file)
    else:
        raise UserError(
            f"{path}: not a folder that datasets.save_to_disk wrote"
            + (choice_in(path, *ENDINGS) or "; name a file of rows")
        )


def row_chunks(path: Path, rows: Iterable[object]) -> Iterator[Chunk]:
    iterator = iter(rows)
    return listed_chunks(path, iter(lambda: list(islice(iterator, CHUNK_ROWS)), []))


def listed_chunks(path: Path, lists: Iterable[Sequence[object]]) -> Iterator[Chunk]:
    first = 1
    for items in lists:
        yield Chunk(str(path), first, tuple(items))
        first += len(items)


def parse_split(split: str) -> tuple[str, Bounds | None]:
    """Parse a split: "train[10:20]" -> ("train", ("10", "20")); "" -> ("", None)."""
    match = re.fullmatch(r"([\w.-]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UserError(f"split {split!r}: write train, train[:1000], train[10%:20%] or [500:]")
    name, begin, end = match.groups()
    return name, (begin, end) if split.endswith("]") else None


def select(chunks: Iterable[Chunk], bounds: Bounds, again: Callable[[], Iterable[Chunk]]) -> Iterator[Chunk]:
    """Yield the rows of `chunks` within bounds, counted first by `again` for percentages and negative numbers."""
    total = 0
    if any(bound and not bound.isdigit() for bound in bounds):
        total = sum(len(chunk.items) for chunk in again())

    def number(bound: str | None, default: int) -> int:
        if bound is None:
            return default
        value = int(bound.rstrip("%"))
        value = round(total * value / 100) if bound.endswith("%") else value
        return value + total if value < 0 else value

    begin, end = number(bounds[0], 0), number(bounds[1], sys.maxsize)
    before = 0  # items of the chunks before, in other files of a folder too
    for chunk in chunks:
        low, high = max(begin - before, 0), min(end - before, len(chunk.items))
        before += len(chunk.items)
        if low < high:
            yield Chunk(chunk.source, chunk.first + low, chunk.items[low:high])
        if high < len(chunk.items):
            return


def csv_rows(path: Path) -> Iterator[dict[str, str] | UserError]:
    """Yield each row as {name in the first line: cell}, or a UserError for a row with more or fewer cells than names.

    The most frequent of DELIMITERS in the first line separates cells. Raises UserError if the file is no CSV, and
    UnicodeDecodeError if it is not UTF-8.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = max(DELIMITERS, key=file.readline().count)
        file.seek(0)
        csv.field_size_limit(MOST_CHARACTERS)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            yield from named(reader, path)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: not CSV ({told(error)}); a cell that holds a quote, a comma or a "
                'line end stands in quotes ("…"), its own quotes twice ("")'
            ) from error


def named(rows: Iterator[list[str]], path: Path) -> Iterator[dict[str, str] | UserError]:
    """Yield the rows after the first as csv_rows does, without blank lines. Raises UserError for a name twice."""
    names = [name.strip() for name in next(rows, [])]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UserError(
            f"{path}: the first line names {short(twice[0])!r} twice; give each column a name of its own, or write a "
            "line of names, such as question,answer, above if it is a row"
        )
    for cells in filter(None, rows):
        if len(cells) == len(names):
            yield dict(zip(names, cells))
        else:
            yield UserError(f"a row has {len(cells)} cells, and the first line names {len(names)}")
