"""The groups of rows that parquet files and datasets folders are stored in, which are read one by one in any order."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..cli.errors import UserError
from .arrow_rows import arrow_batches, batch_rows, open_parquet, parquet_rows, saved_files
from .folders import choose, is_saved, row_files
from .rows import Chunk, parse_split


class Group(NamedTuple):
    """Group `number` of a file holds its rows from `first` on, counted from 1."""

    file: Path
    number: int
    first: int
    rows: int


class RowGroups:
    """The groups of rows of a .parquet file, a folder of them, or a folder that datasets.save_to_disk wrote. Only what
    the files say of their groups is read at first. Raises UserError for other inputs, and for damaged files."""

    def __init__(self, path: str | Path, split: str = "") -> None:
        path, (name, bounds) = Path(path), parse_split(split)
        if bounds:
            raise UserError(
                f"--sft_split {split}: --stream reads whole splits; leave out the part in brackets, or --stream"
            )
        self.columns: dict[Path, list[str] | None] = {}  # of the files of a datasets folder: the columns to read
        if path.is_dir() and is_saved(path):
            self.columns = dict(saved_files(path, name))
            files = list(self.columns)
        else:
            splits = row_files(path) if path.is_dir() else {"": [path]}
            files = splits[choose(splits, name, path)] if splits and path.is_dir() else splits.get("", [])
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

    def _groups(self, file: Path) -> Iterator[Group]:
        first = 1
        for number, rows in enumerate(self._sizes(file)):
            yield Group(file, number, first, rows)
            first += rows

    def _sizes(self, file: Path) -> list[int]:
        if self.columns:
            return [len(batch) for batch in self._batches(file)]
        metadata = self._parquet(file).metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def read(self, group: Group) -> Iterator[Chunk]:
        """Yield the rows of a group, each as a Chunk, so that each is known by its number."""
        lists: Iterator[list[dict[str, Any]]]
        if self.columns:
            lists = batch_rows(group.file, self._batches(group.file)[group.number], self.columns[group.file])
        else:
            lists = parquet_rows(group.file, self._parquet(group.file), group.number)
        for number, row in enumerate(chain.from_iterable(lists), group.first):
            yield Chunk(str(group.file), number, (row,))
