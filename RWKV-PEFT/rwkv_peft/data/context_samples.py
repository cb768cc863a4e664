"""Samples of rows with contexts, each read twice: without its context by a student, and with it by a teacher."""

from collections.abc import Sequence

import numpy as np
import torch

from ..cli import counted
from .binidx import BinidxDataset
from .collate import Document, Sample, collate_packed
from .masks import Mask
from .samples import DocumentSamples


class ContextSamples(DocumentSamples):
    """Sample n is a list of two documents, (tokens (T + 1,), mask (T,)) each: a question with its answer, and the same
    behind its context; as many tokens count in both. A batch packs the former, and beside them, under names that begin
    with teacher_, the latter."""

    kind = counted = "row"

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        super().__init__(dataset, ctx_len, seed, mask)
        self._choose(np.arange(len(dataset) // 2))
        self.notes = [f"{counted(len(self), 'row')} with contexts an epoch"]

    def __getitem__(self, n: int) -> list[Document]:
        first = 2 * self.unit(n)
        context, own = self.document(first)[0], self.document(first + 1)
        whole = torch.cat([context, own[0]]), torch.cat([own[1].new_zeros(len(context)), own[1]])
        return [own, whole]

    def count(self, n: int) -> float:
        return self.document_count(2 * self.unit(n) + 1)

    def packs(self, rows: int) -> tuple[int, int]:
        return rows, rows

    def collate(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        own, whole = zip(*rows)
        seen = collate_packed(whole)
        return collate_packed(own) | {f"teacher_{name}": seen[name] for name in ("tokens", "counted", "cu_seqlens")}
