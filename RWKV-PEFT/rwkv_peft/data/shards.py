"""Token files in shards, read as one set: PREFIX.json is a manifest, whose entry "shards" lists them in their order.

An entry is {"name", "documents", "tokens"}; PREFIX-00001.bin, .idx and the others of a shard are a set by themselves.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from ..cli.errors import UserError
from ..cli.numeric import is_whole
from .binidx import REMEDY, BinidxDataset
from .prefix import MOST_SHARDS, binidx_prefix, manifest_of, shard_at


def open_dataset(path: str | Path) -> BinidxDataset:
    """Open the token files of a PREFIX, which may be in shards. Raises UserError as BinidxDataset does."""
    return ShardedDataset(path) if manifest_of(path) else BinidxDataset(path)


class Chain:
    """Reads slices of several arrays as if they were one. A part that is None holds `filler` everywhere."""

    def __init__(self, parts: Sequence[np.ndarray | None], sizes: Sequence[int], dtype: DTypeLike, filler: int) -> None:
        self.parts, self.dtype, self.filler = parts, np.dtype(dtype), filler
        self.starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, _ = key.indices(len(self))
        number = bisect_right(self.starts, start) - 1
        pieces = []
        while start < stop:
            begin, end = self.starts[number], min(self.starts[number + 1], stop)
            part = self.parts[number]
            pieces.append(
                np.full(end - start, self.filler, self.dtype) if part is None else part[start - begin : end - begin]
            )
            start, number = end, number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, self.dtype)])


class ShardedDataset(BinidxDataset):
    """A BinidxDataset over shards. Its index is in memory, 12 bytes a document; tokens and masks stay on the disk."""

    def __init__(self, path: str | Path) -> None:
        self.prefix = binidx_prefix(path)
        self.bin_path = self.idx_path = manifest = f"{self.prefix}.json"
        self.mask_path, self.weights_path = f"{self.prefix}-….mask", f"{self.prefix}-….weights"
        self.parts = [opened(manifest, shard_at(path, entry), entry) for entry in checked(manifest, manifest_of(path))]
        first = self.parts[0]
        for part in self.parts:
            if part.dtype != first.dtype:
                raise UserError(
                    f"{manifest}: {part.bin_path} holds {part.dtype.name} and {first.bin_path} {first.dtype.name}, "
                    f"which are not shards of one set; {REMEDY}"
                )
        self.dtype = first.dtype
        sizes = [len(part.tokens) for part in self.parts]
        self.tokens = Chain([part.tokens for part in self.parts], sizes, self.dtype, 0)  # type: ignore[assignment]
        masks, weights = [part.mask for part in self.parts], [part.weights for part in self.parts]
        has_mask = any(mask is not None for mask in masks)
        self.mask = Chain(masks, sizes, np.uint8, 1) if has_mask else None  # type: ignore[assignment]
        self.weights = None
        if any(found is not None for found in weights):
            ones = (np.ones(len(part), np.float32) for part in self.parts)
            self.weights = np.concatenate([one if found is None else found for one, found in zip(ones, weights)])
        self.sizes = np.concatenate([part.sizes for part in self.parts])
        ends = np.cumsum(self.sizes, dtype=np.int64)
        self.pointers = (ends - self.sizes) * self.dtype.itemsize

    def digest(self, with_mask: bool) -> str:
        return "".join(part.digest(with_mask) for part in self.parts)

    def check_vocab(self, vocab_size: int) -> None:
        for part in self.parts:
            part.check_vocab(vocab_size)


def checked(manifest: str, entries: Sequence[object]) -> Sequence[object]:
    """Raise UserError for a manifest of too many shards."""
    if len(entries) > MOST_SHARDS:
        raise UserError(
            f"{manifest} lists {len(entries):,} shards, and at most {MOST_SHARDS:,} are read; make larger ones"
        )
    return entries


def opened(manifest: str, prefix: str, entry: object) -> BinidxDataset:
    """Open the shard of a manifest's entry. Raises UserError if it is missing or damaged, or not the one described."""
    due = [entry.get(name) for name in ("documents", "tokens")] if isinstance(entry, dict) else []
    if not prefix or not all(map(is_whole, due)):
        raise UserError(f"{manifest}: a shard is {{name, documents, tokens}}, and one is {str(entry)[:80]}; {REMEDY}")
    try:
        found = BinidxDataset(prefix)
    except UserError as error:
        raise UserError(f"{manifest} names the shard {prefix}: {error}") from error
    if [len(found), len(found.tokens)] != due:
        raise UserError(
            f"{manifest} names the shard {prefix} of {due[0]:,} documents and {due[1]:,} tokens, and it has "
            f"{len(found):,} and {len(found.tokens):,}: it is of another set; put the right file there, or {REMEDY}"
        )
    return found
