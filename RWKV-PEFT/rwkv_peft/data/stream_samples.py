"""Samples of rows that are read, tokenized and shuffled while a run goes on, for data that takes too long, or too much
room, to be tokenized before.

An epoch visits the groups of rows of the files in an order of its own, and cuts it into windows of at least --stream
rows. The rows of a window are in memory at once, in an order of their own. So a sample depends on its number alone, and
a resumed run reads only the window that it stopped in. A row that is left out is a sample that counts nothing, because
it is found only when it is read.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cli.errors import UserError
from ..cli.parser import counted
from ..config import DataConfig
from .binidx import TOKEN_TYPES, BinidxDataset, dtype_code
from .encoding import Encoded, EncodeSettings, Totals, encoder
from .masks import weighted
from .report import laid_out, left_out
from .rows import (
    BATCH_ROWS,
    arrow_batches,
    choose,
    is_saved,
    parse_split,
    reading_arrow,
    row_files,
    rows_of,
    saved_files,
)
from .samples import PaddedSamples, Permutation, Sample, Samples

LEFT_OUT = (0, 0)  # the tokens of a row that is left out


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
        if path.is_dir() and is_saved(path):
            self.files = list(saved_files(path, split))
        else:
            splits = row_files(path) if path.is_dir() else {"": [path]}
            self.files = splits[choose(splits, split if path.is_dir() else "", path)] if splits else []
            self.files = self.files if all(file.suffix == ".parquet" for file in self.files) else []
        if not self.files:
            raise UserError(
                f"--data_file {path}: --stream reads .parquet files, and folders that datasets.save_to_disk wrote, "
                "whose rows are found without reading all before; leave --stream out"
            )
        self._opened = lru_cache(maxsize=16)(open_groups)
        self.groups = [group for file in self.files for group in self._groups(file)]
        self.rows = sum(group.rows for group in self.groups)
        if not self.rows:
            raise UserError(f"--data_file {path} holds no row; name data with rows")

    def _groups(self, file: Path) -> Iterator[RowGroup]:
        first = 1
        for number, rows in enumerate(self._opened(file)[0]):
            yield RowGroup(file, number, first, rows)
            first += rows

    def read(self, group: RowGroup) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number in the file, row) of each row of a group."""
        with reading_arrow(group.file):
            batches = self._opened(group.file)[1](group.number)
            yield from enumerate((row for batch in batches for row in rows_of(batch)), group.first)


def open_groups(file: Path) -> tuple[list[int], Callable[[int], Iterable[Any]]]:
    """The sizes of a file's groups of rows, and a function that reads the batches of one by its number."""
    with reading_arrow(file) as arrow:
        if file.suffix != ".parquet":
            batches = list(arrow_batches(file))  # mapped, as long as they are held
            return list(map(len, batches)), lambda number: [batches[number]]
        parquet = arrow.parquet.ParquetFile(file)
        sizes = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
        return sizes, lambda number: parquet.iter_batches(BATCH_ROWS, [number])


class Windows(NamedTuple):
    """The windows of an epoch: the sample at which each begins, and the numbers of its groups."""

    starts: list[int]
    groups: list[list[int]]


class WindowDataset(BinidxDataset):
    """Documents in memory as a BinidxDataset."""

    mask: np.ndarray

    def __init__(self, rows: RowGroups, part: Encoded, dtype: np.dtype) -> None:
        self.prefix = self.bin_path = self.idx_path = self.mask_path = self.weights_path = str(rows.files[0])
        self.dtype = dtype
        self.tokens, self.mask = np.frombuffer(part.tokens, dtype), np.frombuffer(part.mask, np.uint8)
        self.sizes = np.array(part.sizes, dtype=np.int32)
        ends = np.cumsum(self.sizes, dtype=np.int64)
        self.pointers = (ends - self.sizes) * dtype.itemsize
        weights = np.array(part.weights, dtype=np.float32)
        self.weights = weights if (weights != 1).any() else None
        sizes = [(path.name, path.stat().st_size) for path in rows.files]
        groups = [group.rows for group in rows.groups]
        self.identity = hashlib.sha256(repr((sizes, groups)).encode(errors="surrogateescape")).hexdigest()

    def digest(self, with_mask: bool) -> str:
        """A hash of the names and sizes of the files and of their groups of rows: one of all their content would take
        the time that --stream saves."""
        return self.identity


class StreamSamples(Samples):
    """One row a sample, cut to ctx_len + 1 tokens, as PaddedSamples over the documents of a window."""

    kind = counted = "row"

    def __init__(self, config: DataConfig, settings: EncodeSettings) -> None:
        name, bounds = parse_split(config.sft_split)
        if bounds:
            raise UserError(
                f"--sft_split {config.sft_split}: --stream reads whole splits; leave out the part in brackets, or "
                "--stream"
            )
        self.rows = RowGroups(Path(config.path), name)
        self.config, self.settings, self.bucketed = config, settings, False
        super().__init__(range(self.rows.rows), config.seed)
        self._windows = lru_cache(maxsize=4)(self._cut)
        self._encoded = lru_cache(maxsize=2)(self._encode)  # a step may begin in one window and end in the next
        self._window = lru_cache(maxsize=2)(self._samples)
        self.dataset, totals = self._encoded(0, 0)
        first, windows = len(self.dataset), len(self._windows(0).starts)
        self.notes += [
            f"{self.rows.rows:,} rows of {counted(len(self.rows.files), 'file')}, tokenized as they are read, and "
            f"shuffled in {counted(windows, 'window')} an epoch (--stream {config.stream})",
            f"of the first {first:,} rows: {np.count_nonzero(self.dataset.mask):,} of {len(self.dataset.tokens):,} "
            "tokens count",
        ]
        self.row_notes = [f"of the first {first:,} rows: {note}" for note in laid_out(totals) + left_out(totals)]
        self.notes += self.row_notes

    @property
    def tokens(self) -> int:
        """An estimate by the first window."""
        return round(len(self) * self.head().tokens / len(self.head()))

    def head(self) -> PaddedSamples:
        return self._window(0, 0)

    def bucket(self, wanted: bool) -> None:
        self.bucketed = wanted
        self._window.cache_clear()

    def subset(self, chosen: np.ndarray) -> Samples:
        raise UserError("--val_split keeps samples back, and --stream does not know them before; give --val_data")

    def __getitem__(self, n: int) -> Sample:
        samples, place = self._at(n)
        return samples[place]

    def count(self, n: int) -> float:
        samples, place = self._at(n)
        return samples.count(place)

    def _at(self, n: int) -> tuple[PaddedSamples, int]:
        """Sample n -> the samples of its window, and its place there."""
        epoch, position = divmod(n, len(self))
        starts = self._windows(epoch).starts
        number = bisect_right(starts, position) - 1
        return self._window(epoch, number), position - starts[number]

    def _cut(self, epoch: int) -> Windows:
        groups = self.rows.groups
        order = range(len(groups)) if self.seed is None else Permutation(len(groups), self.seed, epoch, "groups")
        windows, at, room = Windows([], []), 0, 0
        for number in filter(lambda number: groups[number].rows, order):
            if room <= 0:
                windows.starts.append(at)
                windows.groups.append([])
                room = self.config.stream
            windows.groups[-1].append(number)
            at, room = at + groups[number].rows, room - groups[number].rows
        return windows

    def _samples(self, epoch: int, number: int) -> PaddedSamples:
        dataset, seed = self._encoded(epoch, number)[0], self.seed
        if seed is not None:
            key = repr((seed, epoch, number, "window")).encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        stored = dataset.mask
        mask = weighted(lambda start, stop: stored[start:stop] != 0, dataset)
        samples = PaddedSamples(dataset, self.config.ctx_len, seed, mask)
        samples.bucket(self.bucketed)
        return samples

    def _encode(self, epoch: int, number: int) -> tuple[WindowDataset, Totals]:
        """Read and tokenize a window -> its documents, one for each row, and the counts of its rows."""
        encode, whole = encoder(self.settings), self.config.loss_mask != "file"
        window, totals = Encoded(), Totals()
        left_out = Encoded([len(LEFT_OUT)], [1.0], array(encode.code, LEFT_OUT).tobytes(), bytes(len(LEFT_OUT)))
        for group in map(self.rows.groups.__getitem__, self._windows(epoch).groups[number]):
            for place, row in self.rows.read(group):
                part = encode.encode(f"{group.file}, row {place}", row, totals)
                if part is None or part.sizes[0] < 2:
                    part = left_out
                elif whole:
                    part.mask = b"\1" * len(part.mask)
                window.tokens += part.tokens
                window.mask += part.mask
                window.sizes.append(part.sizes[0])
                window.weights.append(part.weights[0])
        if totals.bad and not self.settings.skip_bad_rows:
            raise UserError(*totals.bad.lines(), "(--skip_bad_rows leaves such rows out)")
        dtype = np.dtype(TOKEN_TYPES[dtype_code(encode.tokenizer.vocab_size)])
        return WindowDataset(self.rows, window, dtype), totals
