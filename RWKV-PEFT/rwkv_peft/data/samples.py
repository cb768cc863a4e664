"""Samples: the content of a batch's rows, in an order that the seed determines (None: the order of the file).

Sample n, for any n >= 0, is sample n % len of epoch n // len; each epoch visits every sample once,
in its own order. A sample is (tokens, mask): tokens int64 (T + 1,), inputs are tokens[:-1] and
targets tokens[1:], and mask bool (T,) says which targets count, or float32 (T,) how much. (A packed sample or a pair is
a list of these.)
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ..cli.errors import UserError
from ..cli.parser import counted
from .binidx import BinidxDataset
from .collate import Document, Sample, collate
from .masks import Mask
from .order import Permutation
from .recorded import Vocabulary

BUCKET, RUN = 512, 16  # documents that are sorted by length together, and those of similar length that stay together
STRETCH = 1 << 14  # documents that begin in the same stretch of so many tokens are masked in one call
Units = range | np.ndarray


class Samples(ABC):
    """`units` numbers of things to visit (windows, documents, rows) in `dataset`, each once an epoch.

    `kind` is the word for a sample, and `counted` that for what people count of their data, which `size` is the number
    of: rows, of which a packed sample holds several."""

    dataset: BinidxDataset
    kind = counted = "window"

    def bucket(self, wanted: bool) -> None:  # noqa: B027 (most have nothing to do)
        """Tell the samples, before the first is read, whether rows of similar length are to come together."""

    def __init__(self, units: Units, seed: int | None) -> None:
        self.seed = seed
        self.notes: list[str] = []
        self.row_notes: list[str] = []  # those of the notes that are on rows left out, or laid out oddly
        self.vocabulary: Vocabulary | None = None
        self._choose(units)

    def _choose(self, units: Units) -> None:
        self.units = units
        self._order = lru_cache(maxsize=4)(self._make_order)

    def _make_order(self, epoch: int) -> range | Permutation:
        number = len(self.units)
        return range(number) if self.seed is None else Permutation(number, self.seed, epoch)

    def subset(self, chosen: np.ndarray) -> "Samples":
        """The same kind of samples over only the chosen positions of `units`."""
        result = copy.copy(self)
        result.notes = list(self.notes)
        result._choose(np.asarray(self.units)[chosen])
        return result

    def __len__(self) -> int:
        return len(self.units)

    def head(self) -> "Samples":
        """Samples that begin as these do, and that are all at hand."""
        return self

    @property
    def size(self) -> int:
        """The number of what people count that an epoch reads."""
        return len(self)

    @property
    @abstractmethod
    def tokens(self) -> int:
        """The number of tokens that an epoch reads as inputs."""

    @property
    def parts(self) -> Sequence["Samples"]:
        """The samples of each data set by itself."""
        return [self]

    def seen(self, number: int) -> dict[str, float]:
        """The times that `number` samples in a row read each data set, by its name; "" if there is one alone."""
        return {"": number / len(self)}

    @abstractmethod
    def __getitem__(self, n: int) -> Sample:
        """Sample n."""

    @abstractmethod
    def count(self, n: int) -> float:
        """The number of targets of sample n that count, or the sum of their weights."""

    def collate(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """The tensors of a batch of samples."""
        return collate(rows)

    def unit(self, n: int) -> int:
        """Sample n -> the one of `units` that it visits."""
        epoch, position = divmod(n, len(self.units))
        return int(self.units[self._order(epoch)[position]])


class WindowSamples(Samples):
    """Dataload "get": windows of ctx_len + 1 tokens from the stream of all documents.

    Window i holds the targets i*ctx_len + 1 ... (i+1)*ctx_len, as RWKV-LM cuts them. If the last window is short of
    targets, it begins earlier and masks those that the window before counts, so that an epoch counts every token of the
    data but the first exactly once.
    """

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        targets = len(dataset.tokens) - 1
        if targets < ctx_len:
            raise UserError(
                f"--ctx_len {ctx_len}: {dataset.bin_path} holds {targets + 1} tokens, and a window takes "
                f"ctx_len + 1; take --ctx_len {max(targets, 1)} or less, or --dataload pad"
            )
        self.dataset, self.ctx_len, self._mask = dataset, ctx_len, mask
        self._last = -(-targets // ctx_len) - 1
        super().__init__(range(self._last + 1), seed)
        self._overlap = len(self) * ctx_len - targets  # targets that the last window must not count again
        self.notes.append(f"{targets + 1:,} tokens, {counted(len(self), 'window')} of {ctx_len}")
        if self._overlap:
            self.notes.append(f"the last window shares {self._overlap} targets with the one before; they count once")

    @property
    def tokens(self) -> int:
        return len(self) * self.ctx_len

    def __getitem__(self, n: int) -> Sample:
        start, repeated = self._window(n)
        tokens = self.dataset.tokens[start : start + self.ctx_len + 1].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(self._counted(start, repeated))

    def count(self, n: int) -> float:
        start, repeated = self._window(n)
        return self.ctx_len - repeated if self._mask is None else total(self._counted(start, repeated))

    def _window(self, n: int) -> tuple[int, int]:
        """Sample n -> the window's first token, and the number of its first targets that the window before counts."""
        index = self.unit(n)
        repeated = self._overlap if index == self._last else 0
        return index * self.ctx_len - repeated, repeated

    def _counted(self, start: int, repeated: int) -> np.ndarray:
        if self._mask is None:
            counted = np.ones(self.ctx_len, dtype=bool)
        else:
            counted = self._mask(start + 1, start + self.ctx_len + 1)
        counted[:repeated] = False
        return counted


class DocumentSamples(Samples):
    """One document a row, cut to ctx_len + 1 tokens.

    With `bucketed`, documents of similar length come together: each 512 of the epoch's order are sorted by length and
    cut into runs of 16; the runs are shuffled, and the documents of each run, too.
    """

    bucketed = False
    units: np.ndarray
    kind = counted = "row"

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        self.dataset, self.ctx_len, self._mask = dataset, ctx_len, mask
        super().__init__(readable_documents(dataset), seed)
        self.notes += [counted(len(self), "document"), *not_read(dataset, ctx_len)]
        if note := self._cut_answers():
            self.notes.append(note)

    @property
    def tokens(self) -> int:
        return self._tokens_of(self.units)

    def _tokens_of(self, documents: np.ndarray) -> int:
        """The number of tokens of these documents that are read."""
        return int(np.minimum(self.dataset.sizes[documents].astype(np.int64) - 1, self.ctx_len).sum())

    def _choose(self, units: Units) -> None:
        super()._choose(units)
        self._bucket = lru_cache(maxsize=8)(self._make_bucket)

    def __getitem__(self, n: int) -> Sample:
        return self.document(self.unit(n))

    def count(self, n: int) -> float:
        return self.document_count(self.unit(n))

    def unit(self, n: int) -> int:
        if not self.bucketed:
            return super().unit(n)
        epoch, position = divmod(n, len(self))
        return int(self._bucket(epoch, position // BUCKET)[position % BUCKET])

    def document(self, index: int) -> Document:
        """(tokens, mask) of document `index`, cut to ctx_len + 1 tokens."""
        start, size = self._extent(index)
        tokens = self.dataset.tokens[start : start + size].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(self._counted(start, size))

    def document_count(self, index: int) -> float:
        """The number of targets of document `index` that count, or the sum of their weights."""
        start, size = self._extent(index)
        return size - 1 if self._mask is None else total(self._counted(start, size))

    def _cut_answers(self) -> str:
        """A note on the tokens that the mask counts and --ctx_len cuts off; "" if there are none."""
        mask, lost, bare, limit = self._mask, 0, 0, self.ctx_len + 1
        cut = np.flatnonzero(self.dataset.sizes > limit)
        if mask is None or not len(cut):
            return ""
        begins = self.dataset.pointers[cut] // self.dataset.dtype.itemsize
        ends = begins + self.dataset.sizes[cut]
        # documents that lie near each other share a call, because a call for each takes long
        for near in np.split(np.arange(len(cut)), np.flatnonzero(np.diff(begins // STRETCH)) + 1):
            first, last = int(begins[near].min()), int(ends[near].max())
            before = np.concatenate(([0], np.cumsum(mask(first, last) != 0)))  # counted tokens before each
            begin, end = begins[near] - first, ends[near] - first
            behind = before[end] - before[begin + limit]
            lost += int(behind.sum())
            bare += int(np.count_nonzero((behind > 0) & (before[begin + limit] == before[begin + 1])))
        if not lost:
            return ""
        return (
            f"note: {lost:,} of the tokens that would count in the loss are among those not read, and "
            f"{counted(bare, 'document')} {'keeps' if bare == 1 else 'keep'} none"
        )

    def _extent(self, index: int) -> tuple[int, int]:
        return self.dataset.start(index), min(int(self.dataset.sizes[index]), self.ctx_len + 1)

    def _counted(self, start: int, size: int) -> np.ndarray:
        return np.ones(size - 1, dtype=bool) if self._mask is None else self._mask(start + 1, start + size)

    def _make_bucket(self, epoch: int, number: int) -> np.ndarray:
        """The documents at the positions [512 number, 512 number + 512) of an epoch, in runs of similar length."""
        order = self._order(epoch)
        positions = range(number * BUCKET, min((number + 1) * BUCKET, len(self)))
        documents = self.units[[order[position] for position in positions]]
        documents = documents[np.argsort(self.dataset.sizes[documents], kind="stable")]
        runs = [documents[first : first + RUN] for first in range(0, len(documents), RUN)]
        mixed = [run[list(Permutation(len(run), self.seed, epoch, number, i))] for i, run in enumerate(runs)]
        return np.concatenate([mixed[i] for i in Permutation(len(runs), self.seed, epoch, number)])


class PaddedSamples(DocumentSamples):
    """Dataload "pad": the rows of a batch are padded to the longest, so rows of similar length should share a batch.

    If that is wanted and there is a seed, the order is bucketed; it does not depend on how many rows share one. A run
    whose rows are each alone in a batch does not want it: nothing is padded, and the order is a plain shuffle.
    """

    def bucket(self, wanted: bool) -> None:
        self.bucketed = wanted and self.seed is not None


class SingleSamples(DocumentSamples):
    """Dataload "only": one document at a time, never padded."""


def total(counted: np.ndarray) -> float:
    """The sum of a mask: a number of targets, or the sum of their weights."""
    return counted.sum(dtype=None if counted.dtype == bool else np.float64).item()


def readable_documents(dataset: BinidxDataset) -> np.ndarray:
    """The numbers of the documents that have a target. Raises UserError if none has."""
    documents = np.flatnonzero(dataset.sizes >= 2)
    if not len(documents):
        raise UserError(f"{dataset.idx_path}: every document has fewer than 2 tokens, nothing to predict")
    return documents


def not_read(dataset: BinidxDataset, ctx_len: int) -> list[str]:
    """The notes on documents that are left out, and on tokens that are cut off."""
    sizes = dataset.sizes
    notes: list[str] = []
    short = int((sizes < 2).sum())
    if short:
        notes.append(f"{counted(short, 'document')} of fewer than 2 tokens {'is' if short == 1 else 'are'} left out")
    excess = sizes[sizes > ctx_len + 1].astype(np.int64) - (ctx_len + 1)
    if len(excess):
        notes.append(
            f"{counted(len(excess), 'document')} of more than --ctx_len {ctx_len} tokens, cut there: {excess.sum():,} "
            f"of {len(dataset.tokens):,} tokens are not read; the longest needs --ctx_len {int(sizes.max()) - 1}"
        )
    return notes
