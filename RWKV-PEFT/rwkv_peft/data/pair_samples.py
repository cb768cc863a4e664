"""Samples of preference training: pairs of documents, a better and a worse answer."""

import numpy as np

from ..cli import counted
from .binidx import BinidxDataset
from .collate import Document
from .masks import Mask
from .samples import DocumentSamples


class AnswerSamples(DocumentSamples):
    """Samples of two documents, which count as one target, because the loss is that of answers."""

    def packs(self, rows: int) -> tuple[int, int]:
        return 2 * rows, 2 * rows

    def count(self, n: int) -> int:
        return 1


class PairSamples(AnswerSamples):
    """Sample n is a list of two consecutive documents, (tokens (T + 1,), mask (T,)) each, the better answer first."""

    kind = counted = "pair"

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        super().__init__(dataset, ctx_len, seed, mask)
        self._choose(np.arange(len(dataset) // 2))
        self.notes = [f"{counted(len(self), 'pair')} of answers an epoch"]

    def __getitem__(self, n: int) -> list[Document]:
        first = 2 * self.unit(n)
        return [self.document(first), self.document(first + 1)]
