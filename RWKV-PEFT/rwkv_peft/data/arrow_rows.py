"""Reads rows of parquet files and of folders that datasets.save_to_disk wrote, in lists of about a megabyte.

Values are read as they are stored, but for JSON: a date is its number, a picture its bytes or its address.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checkpoints.readable import read_settings, require_readable
from ..cli.errors import UNREADABLE, UserError, told
from .folders import SAVED, SPLITS, choose, require_within

PIECE_BYTES, PIECE_ROWS = 1 << 20, 1000  # the size of a list of rows
BATCH_BYTES = 1 << 28  # unpacked at once, about
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


def open_parquet(path: Path) -> Any:
    """Open a parquet file -> pyarrow's ParquetFile. Raises UserError for damage."""
    arrow = import_pyarrow(path)
    with telling_damage(path, "a parquet file"):
        return arrow.parquet.ParquetFile(path)


def parquet_rows(path: Path, opened: Any = None, group: int | None = None) -> Iterator[list[Row]]:
    """Yield the rows of a parquet file, or of one of its groups of rows, in lists; opened is what open_parquet gave.
    Raises UserError as that does."""
    file = opened or open_parquet(path)
    with telling_damage(path, "a parquet file"):
        groups = range(file.metadata.num_row_groups) if group is None else [group]
        unpacked = sum(file.metadata.row_group(number).total_byte_size for number in groups)
        rows = sum(file.metadata.row_group(number).num_rows for number in groups)
        size = min(max(BATCH_BYTES * rows // max(unpacked, 1), 1), PIECE_ROWS)
        for batch in file.iter_batches(batch_size=size, row_groups=list(groups)):
            yield from pieces(batch)


def saved_rows(path: Path, split: str) -> Iterator[list[Row]]:
    """Yield the rows of a folder that datasets.save_to_disk wrote, in lists; if it has several splits, those of
    `split`. Raises UserError for a folder that is damaged, incomplete, or in an order of its own."""
    for file, columns in saved_files(path, split):
        for batch in arrow_batches(file):
            yield from batch_rows(file, batch, columns)


def saved_files(path: Path, split: str) -> Iterator[tuple[Path, list[str] | None]]:
    """Yield the files of a folder that datasets.save_to_disk wrote, each with the columns to read (None: all)."""
    import_pyarrow(path)
    root = path
    if (path / SPLITS).is_file():
        splits = settings(path / SPLITS).get("splits")
        path = path / choose(filter(is_own, splits) if isinstance(splits, list) else (), split, path)
    state = settings(path / SAVED)
    if state.get("_indices_data_files"):
        raise UserError(f"{path} keeps its rows in an order of its own; save it again with a newer datasets")
    kept = state.get("_format_columns")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / SAVED} names no files of rows ({told(error)}); copy the folder again") from error
    for name, times in Counter(names).items():
        if times > 1 or not is_own(name):  # one file could stand for any number
            what = f"{times} times" if times > 1 else "which is no file of its folder"
            raise UserError(f"{path / SAVED} names {name!r}, {what}; copy the folder again")
        file = require_readable(path / name, f"{path / name} is missing; copy the folder again", again=True)
        yield require_within(root, file), kept if isinstance(kept, list) else None


def arrow_batches(file: Path) -> Iterator[Any]:
    """Yield the groups of rows of a file of Arrow, mapped and not checked. Raises UserError for a damaged one."""
    arrow = import_pyarrow(file)
    with telling_damage(file, "a file of Arrow"), arrow.memory_map(str(file)) as mapped:
        yield from arrow.ipc.open_stream(mapped)


def batch_rows(file: Path, batch: Any, columns: list[str] | None) -> Iterator[list[Row]]:
    """Yield the rows of a group of arrow_batches in lists."""
    with telling_damage(file, "a file of Arrow"):
        batch.validate(full=True)  # nothing has checked for places outside the file yet
        if columns is not None:
            batch = batch.select([column for column in batch.schema.names if column in columns])
        yield from pieces(batch)


def is_own(name: object) -> bool:
    """Return whether a name in a folder's JSON is one of something directly in the folder."""
    return isinstance(name, str) and Path(name).name == name != ".." and name.isprintable()


def settings(path: Path) -> Row:
    """Read the object in a JSON file of a datasets folder. Raises UserError if it is missing or holds none."""
    return read_settings(require_readable(path, f"{path} is missing; copy the folder again", again=True))


@contextmanager
def telling_damage(path: Path, kind: str) -> Iterator[None]:
    """Make a UserError of what pyarrow raises for a broken file, which should be of a kind."""
    from pyarrow import ArrowException

    try:
        yield
    except (*UNREADABLE, ArrowException, MemoryError) as error:
        raise UserError(f"{path}: not {kind}, or a damaged one ({told(error)}); copy it again") from error


def pieces(batch: Any) -> Iterator[list[Row]]:
    """Yield a batch's rows in lists of about PIECE_BYTES."""
    columns = {name: plain(column) for name, column in zip(batch.schema.names, batch.columns)}
    names = [name for name, column in columns.items() if column is not None]
    restorers = {field.name: restorer(field.type, from_json) for field in batch.schema}
    lists = [list(map(restorers[name], columns[name].to_pylist())) for name in names]
    rows = [dict(zip(names, values)) for values in zip(*lists)] if lists else [{} for _ in range(len(batch))]
    step = min(max(1, PIECE_BYTES * len(rows) // max(batch.nbytes, 1)), PIECE_ROWS)
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def restorer(kind: Any, read_json: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what turns a stored value of an Arrow type into what was written.

    JSON is read by read_json, and all objects of a column have the same fields, null where one lacks them, so that a
    call of a tool has the arguments of all others."""
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return read_json if is_json(kind) else restorer(kind.storage_type, read_json)
    if types.is_struct(kind):
        fields = {field.name: restorer(field.type, read_json) for field in kind}
        return lambda value: value and {name: fields[name](inner) for name, inner in value.items() if inner is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        restore = restorer(kind.value_type, read_json)
        return unchanged if restore is unchanged else lambda value: value and list(map(restore, value))
    return unchanged


def unchanged(value: Any) -> Any:
    return value


def from_json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def plain(array: Any) -> Any:
    """Convert an array to its stored values: dates, times and the like become numbers, dictionaries their values. None
    for an array of a type that rows are not read from."""
    kind = plain_type(array.type)
    return None if kind is None else array if kind == array.type else array.cast(kind)


def plain_type(kind: Any) -> Any:
    """The type as which values of an Arrow type are stored, None for a type that rows are not read from."""
    import pyarrow as arrow
    from pyarrow import types

    if isinstance(kind, arrow.BaseExtensionType):
        return plain_type(kind.storage_type)
    if types.is_temporal(kind):
        return {32: arrow.int32(), 64: arrow.int64()}.get(kind.bit_width)
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_struct(kind):
        inner = [plain_type(field.type) for field in kind]
        return None if None in inner else arrow.struct([field.with_type(new) for field, new in zip(kind, inner)])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if (element := plain_type(kind.value_type)) is None:
            return None
        field = kind.value_field.with_type(element)
        if types.is_fixed_size_list(kind):
            return arrow.list_(field, kind.list_size)
        return arrow.list_(field) if types.is_list(kind) else arrow.large_list(field)
    return kind if types.is_primitive(kind) or types.is_null(kind) or types.is_decimal(kind) or is_text(kind) else None


def is_json(kind: Any) -> bool:
    """Return whether a type is Arrow's for texts of JSON."""
    return getattr(kind, "extension_name", "") == "arrow.json"


def is_text(kind: Any) -> bool:
    """Return whether a type is text or bytes, stored value by value."""
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)
