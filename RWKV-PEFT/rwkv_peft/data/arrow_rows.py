"""Rows of parquet files and of folders that datasets.save_to_disk wrote: in order, or group by group in any order.

Values are read as they are stored, but for JSON: a date is its number, a picture its bytes or its address.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..checkpoints.readable import read_settings, require_readable
from ..cli.errors import UNREADABLE, UserError, told
from .folders import SAVED, SPLITS, choose, is_saved, require_within, row_files, saved_splits

LIST_ROWS = 1000  # rows that are unpacked at once
Row = dict[str, Any]


def import_pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:  # pyarrow is missing, or does not fit numpy
        what = path.suffix or "a datasets folder"
        raise UserError(
            f"{path}: reading {what} needs pyarrow ({told(error)}): pip install --upgrade pyarrow numpy"
        ) from None
    return pyarrow


@contextmanager
def reading_arrow(path: Path, kind: str) -> Iterator[ModuleType]:
    """Yield pyarrow; within, its exceptions for a damaged file, which should be of a kind, become a UserError."""
    arrow = import_pyarrow(path)
    try:
        yield arrow
    except (*UNREADABLE, arrow.ArrowException, MemoryError) as error:
        raise UserError(f"{path}: not {kind}, or a damaged one ({told(error)}); copy it again") from error


def open_parquet(path: Path) -> Any:
    """The pyarrow.parquet.ParquetFile at a path."""
    with reading_arrow(path, "a parquet file") as arrow:
        return arrow.parquet.ParquetFile(path)


def parquet_rows(path: Path, opened: Any = None, group: int | None = None) -> Iterator[list[Row]]:
    """Yield the rows of a parquet file, or of one of its groups, in lists; opened is open_parquet's result."""
    file = opened or open_parquet(path)
    with reading_arrow(path, "a parquet file"):
        for batch in file.iter_batches(LIST_ROWS, None if group is None else [group]):
            yield rows_of(batch)


def saved_rows(path: Path, split: str) -> Iterator[list[Row]]:
    """Yield the rows of a folder that datasets.save_to_disk wrote, in lists; of several splits only `split`."""
    for file, columns in saved_files(path, split):
        for batch in arrow_batches(file):
            yield from batch_rows(file, batch, columns)


def saved_files(path: Path, split: str) -> Iterator[tuple[Path, list[str] | None]]:
    """Yield the files of a folder that datasets.save_to_disk wrote, each with the columns to read (None: all). Raises
    UserError for a folder that is damaged, incomplete, or in an order of its own."""
    import_pyarrow(path)
    root = path
    if (path / SPLITS).is_file():
        path = path / choose(saved_splits(path), split, path)
    state = path / SAVED
    settings = read_settings(require_readable(state, f"{state} is missing; copy the folder again", again=True))
    if settings.get("_indices_data_files"):
        raise UserError(f"{path} keeps its rows in an order of its own; save it again with a newer datasets")
    columns = settings.get("_format_columns")
    try:
        names = [str(entry["filename"]) for entry in settings["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{state} names no files of rows ({told(error)}); copy the folder again") from error
    for name in names:
        file = require_readable(path / name, f"{path / name} is missing; copy the folder again", again=True)
        yield require_within(root, file), columns if isinstance(columns, list) else None


def arrow_batches(file: Path) -> Iterator[Any]:
    """Yield the groups of rows of an Arrow file, mapped."""
    with reading_arrow(file, "a file of Arrow") as arrow, arrow.memory_map(str(file)) as mapped:
        yield from arrow.ipc.open_stream(mapped)


def batch_rows(file: Path, batch: Any, columns: list[str] | None) -> Iterator[list[Row]]:
    """Yield the rows of a group of arrow_batches in lists."""
    with reading_arrow(file, "a file of Arrow"):
        batch.validate(full=True)  # offsets that lead out of the mapped file would crash the process
        if columns is not None:
            batch = batch.select([column for column in batch.schema.names if column in columns])
        for first in range(0, len(batch), LIST_ROWS):
            yield rows_of(batch.slice(first, LIST_ROWS))


def rows_of(batch: Any) -> list[Row]:
    """The rows of a group of columns; a column is left out if its type is none that rows have."""
    columns = {name: values_of(column) for name, column in zip(batch.schema.names, batch.columns)}
    rows: list[Row] = [{} for _ in range(len(batch))]
    for name, values in columns.items():
        for row, value in zip(rows, values or ()):
            row[name] = value
    return rows


def values_of(array: Any) -> list[Any] | None:
    """The values of an Arrow array, None for a type that rows do not have.

    Dates, times and the like become their stored numbers, dictionaries their values, JSON its value. Objects lose
    fields that are null, because all objects of a column have the fields of all others, such as arguments of calls."""
    import pyarrow as arrow
    from pyarrow import types

    kind = array.type
    if isinstance(kind, arrow.BaseExtensionType):
        stored = values_of(array.storage)
        if stored is None or kind.extension_name != "arrow.json":
            return stored
        return [None if text is None else json.loads(text) for text in stored]
    if types.is_dictionary(kind):
        return values_of(array.dictionary_decode())
    if types.is_temporal(kind):
        number = {32: arrow.int32(), 64: arrow.int64()}.get(kind.bit_width)
        return None if number is None else array.cast(number).to_pylist()
    if types.is_struct(kind):
        objects: list[Row] = [{} for _ in range(len(array))]
        for inner, part in zip(kind, array.flatten()):
            if (values := values_of(part)) is None:
                return None
            for each, value in zip(objects, values):
                if value is not None:
                    each[inner.name] = value
        return [each if valid else None for each, valid in zip(objects, array.is_valid().to_pylist())]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        values = values_of(array.flatten())
        if values is None:
            return None
        rest = iter(values)
        sizes = array.value_lengths().to_pylist()
        return [None if size is None else list(islice(rest, size)) for size in sizes]
    texts = types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary
    plain = types.is_primitive, types.is_null, types.is_decimal, *texts
    return array.to_pylist() if any(test(kind) for test in plain) else None


class RowGroup(NamedTuple):
    """Group `number` of a file holds `rows` of its rows, from `first` on, counted from 1."""

    file: Path
    number: int
    first: int
    rows: int


class RowGroups:
    """The groups of rows of a parquet file, a folder of them, or a folder that datasets.save_to_disk wrote.

    Only the files' own index of their groups is read at first. Raises UserError for other inputs."""

    def __init__(self, path: Path, split: str = "") -> None:
        self.columns: dict[Path, list[str] | None] = {}  # of the files of a datasets folder: the columns to read
        if path.is_dir() and is_saved(path):
            self.columns = dict(saved_files(path, split))
            files = list(self.columns)
        else:
            splits = row_files(path) if path.is_dir() else {"": [path]}
            files = splits[choose(splits, split if path.is_dir() else "", path)] if splits else []
        if not files or (not self.columns and any(file.suffix != ".parquet" for file in files)):
            raise UserError(
                f"--data_file {path}: --stream reads .parquet files, and folders that datasets.save_to_disk wrote, "
                "whose rows are found without reading all before; leave --stream out"
            )
        self._parquet = lru_cache(maxsize=16)(open_parquet)
        # mapped, as long as they are held
        self._batches = lru_cache(maxsize=16)(lambda file: list(arrow_batches(file)))
        self.files = files
        self.groups = [group for file in files for group in self._groups(file)]
        self.rows = sum(group.rows for group in self.groups)
        if not self.rows:
            raise UserError(f"--data_file {path} holds no row; name data with rows")

    def _groups(self, file: Path) -> Iterator[RowGroup]:
        if self.columns:
            sizes = [len(batch) for batch in self._batches(file)]
        else:
            metadata = self._parquet(file).metadata
            sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        first = 1
        for number, rows in enumerate(sizes):
            yield RowGroup(file, number, first, rows)
            first += rows

    def read(self, group: RowGroup) -> Iterator[tuple[int, Row]]:
        """Yield (number in the file, row) of each row of a group."""
        if self.columns:
            lists = batch_rows(group.file, self._batches(group.file)[group.number], self.columns[group.file])
        else:
            lists = parquet_rows(group.file, self._parquet(group.file), group.number)
        return zip(range(group.first, group.first + group.rows), chain.from_iterable(lists))
