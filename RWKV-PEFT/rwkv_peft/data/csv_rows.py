"""Reads rows of .csv and .tsv files."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, short, told

DELIMITERS = ",;\t"
MOST_CHARACTERS = 1 << 24  # of a cell; without a bound an unclosed quote would take in all that follows


def csv_rows(path: Path) -> Iterator[dict[str, str] | UserError]:
    """Yield each row as {name in the first line: cell}, or a UserError for a row with more or fewer cells than names.

    Cells are separated by the one of DELIMITERS that is most frequent in the first line. Raises UserError if the file
    cannot be read on, and UnicodeDecodeError if it is not UTF-8.
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
    """Yield each row after the first, as csv_rows does; blank lines are left out. Raises UserError if the first row
    has a name twice."""
    names = [name.strip() for name in next(rows, [])]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UserError(f"{path}: the first line names {short(twice[0])!r} twice; give each column a name of its own")
    for cells in filter(None, rows):
        if len(cells) == len(names):
            yield dict(zip(names, cells))
        else:
            yield UserError(f"a row has {len(cells)} cells, and the first line names {len(names)}")
