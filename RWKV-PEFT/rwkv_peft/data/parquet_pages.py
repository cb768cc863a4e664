"""Reads the sizes of a parquet file's pages from the headers before them, so that none is unpacked beyond a bound.

A page may unpack to 30,000 times its bytes, and a value that it holds once may stand in any number of rows. Only its
header says what a page takes, in Thrift's compact protocol; pyarrow reads that header and does not show it
(https://parquet.apache.org/docs/file-format/data-pages/).
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

MOST_BYTES = 1 << 29  # of a page, unpacked
MOST_VALUES = 1 << 26  # of a column's lists in a group of rows, because one row may have any number of them
UNPACKED, PACKED, DATA, DATA_2, VALUES = 2, 3, 5, 8, 1  # fields of a page's header; VALUES is in DATA and DATA_2


class Page(NamedTuple):
    """The bytes of a page once it is unpacked, and the number of its values (0 for a dictionary)."""

    size: int
    values: int


def largest_page(path: Path, metadata: Any) -> int:
    """The bytes of the largest page of a parquet file, unpacked; metadata is pyarrow's. Raises UserError for a page
    beyond MOST_BYTES, and for lists beyond MOST_VALUES; ValueError, LookupError or RecursionError for damage."""
    largest = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column, schema = metadata.row_group(group).column(number), metadata.schema.column(number)
                count = 0
                for page in _pages(mapped, column):
                    largest, count = max(largest, page.size), count + page.values
                if largest > MOST_BYTES:
                    raise UserError(
                        f"{path}: a page of its column {schema.path} takes {largest:,} bytes, and at most "
                        f"{MOST_BYTES:,} are read at once; write it with smaller pages"
                    )
                if schema.max_repetition_level and count > MOST_VALUES:
                    raise UserError(
                        f"{path}: the lists of its column {schema.path} hold {count:,} values in one group of rows, "
                        f"and at most {MOST_VALUES:,} are read at once; write it with smaller groups, or without it"
                    )
    return largest


def _pages(mapped: mmap.mmap, column: Any) -> Iterator[Page]:
    """Yield the pages of a column in a group of rows, in their order in the file."""
    place = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < place:
        place = column.dictionary_page_offset
    end = place + column.total_compressed_size
    while place < end:
        header, place = _struct(mapped, place)
        data = header.get(DATA) or header.get(DATA_2) or {}
        values = data.get(VALUES, 0) if isinstance(data, dict) else -1
        sizes = (header.get(UNPACKED), header.get(PACKED), values)
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"the header of a page has the sizes {sizes}")
        yield Page(header[UNPACKED], values)
        place += header[PACKED]


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    """Read an unsigned number; -> (number, the place behind it)."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _struct(data: mmap.mmap, place: int) -> tuple[dict[int, Any], int]:
    """Read a Thrift struct -> ({field: bool, int or struct, None for doubles and texts}, the place behind it)."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[place] & 15:
        step, place = data[place] >> 4, place + 1
        if step:
            number += step
        else:
            number, place = _signed(data, place)
        fields[number], place = _value(data, place, kind)
    return fields, place + 1


def _signed(data: mmap.mmap, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def _value(data: mmap.mmap, place: int, kind: int) -> tuple[Any, int]:
    """Read a value of one of the kinds of Thrift's compact protocol; -> (value, the place behind it)."""
    if kind in (1, 2):  # true, false, which have no bytes of their own
        return kind == 1, place
    if kind == 3:
        return data[place], place + 1
    if kind in (4, 5, 6):
        return _signed(data, place)
    if kind == 7:
        return None, place + 8
    if kind == 8:
        length, place = _varint(data, place)
        return None, place + length
    if kind == 12:
        return _struct(data, place)
    raise ValueError(f"a page's header has a field of kind {kind}, which none has")
