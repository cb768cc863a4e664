"""Packs several whole documents into one row; none sees another."""

from bisect import bisect_left, insort

import numpy as np

from .binidx import BinidxDataset
from .collate import Document
from .masks import Mask
from .samples import DocumentSamples


class PackedSamples(DocumentSamples):
    """Dataload "pack": rows of documents with at most ctx_len targets in all.

    Sample n is a list of (tokens (T_i + 1,), mask (T_i,)), one for each document. The lengths and the seed
    decide which documents share a row; each epoch visits the rows in its own order.
    Documents longer than ctx_len are cut, as with "pad".
    """

    kind = "packed row"

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        super().__init__(dataset, ctx_len, seed, mask)
        documents = self.units
        shuffled = documents[[self._order(0)[i] for i in range(len(documents))]]
        lengths = np.minimum(np.asarray(dataset.sizes)[shuffled].astype(np.int64), ctx_len + 1) - 1
        self._rows = [shuffled[row] for row in pack(lengths, ctx_len)]
        self._choose(np.arange(len(self._rows)))
        filled = int(lengths.sum()) / (len(self._rows) * ctx_len)
        self.notes.insert(1, f"packed into {len(self._rows)} rows of --ctx_len {ctx_len}, {filled:.1%} full")

    @property
    def size(self) -> int:
        return sum(len(self._rows[unit]) for unit in self.units)

    @property
    def tokens(self) -> int:
        return self._tokens_of(np.concatenate([self._rows[unit] for unit in self.units]))

    def __getitem__(self, n: int) -> list[Document]:
        return [self.document(index) for index in self._rows[self.unit(n)]]

    def count(self, n: int) -> float:
        return sum(self.document_count(index) for index in self._rows[self.unit(n)])


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Pack by best fit, longest first: lengths (n,) up to `room` -> lists of positions that add up to at most that."""
    rows: list[list[int]] = []
    by_free: dict[int, list[int]] = {}  # {free: rows with so much room left}
    free_sizes: list[int] = []  # its keys, sorted
    for position in np.argsort(-lengths, kind="stable"):
        length = int(lengths[position])
        at = bisect_left(free_sizes, length)
        if at < len(free_sizes):
            free = free_sizes[at]
            row = by_free[free].pop()
            if not by_free[free]:
                del by_free[free], free_sizes[at]
        else:
            free, row = room, len(rows)
            rows.append([])
        rows[row].append(int(position))
        free -= length
        if free:
            if free not in by_free:
                by_free[free] = []
                insort(free_sizes, free)
            by_free[free].append(row)
    return rows
