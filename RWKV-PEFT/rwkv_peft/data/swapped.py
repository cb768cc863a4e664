"""Held-out answers behind their own prompts and behind others, whose losses tell if a model answers what is asked."""

from collections.abc import Sequence
from itertools import chain

from .answer_samples import RowSamples, asked, mismatched
from .binidx import BinidxDataset
from .collate import Document, Sample
from .samples import DocumentSamples, Samples

MOST = 32  # rows that are looked at


class OneDocument(Samples):
    """A document of a data set, as the only sample."""

    def __init__(self, dataset: BinidxDataset, document: Document) -> None:
        self.dataset, self.document = dataset, document
        super().__init__(range(1), None)

    @property
    def tokens(self) -> int:
        return len(self.document[0]) - 1

    def __getitem__(self, n: int) -> Sample:
        return self.document

    def count(self, n: int) -> float:
        return float(self.document[1].sum())


def swapped(samples: Samples) -> Sequence[tuple[Samples, Samples]]:
    """(a row, its answer behind the prompt of the next row that has another answer) of the first MOST samples; none for
    rows without a prompt, packed rows, and streams."""
    if not isinstance(samples, DocumentSamples) or isinstance(samples, RowSamples):
        return []
    rows = [row for row in map(samples.__getitem__, range(min(len(samples), MOST))) if isinstance(row, tuple)]
    rows = [row for row in rows if row[1].any() and asked(row) > 1]
    found = []
    for number, row in enumerate(rows):
        for other in chain(rows[number + 1 :], rows[:number]):
            if answer(other) != answer(row):
                documents = (row, mismatched(other, row, samples.ctx_len))
                found.append((OneDocument(samples.dataset, documents[0]), OneDocument(samples.dataset, documents[1])))
                break
    return found


def answer(document: Document) -> list[int]:
    """The tokens of a document from the first that counts on."""
    return document[0][asked(document) :].tolist()
