"""Samples: the content of a batch's rows, in an order that the seed determines (None: the order of the file).

Sample n, for any n >= 0, is sample n % len of epoch n // len; each epoch visits every sample once,
in its own order. A sample is (tokens, mask): tokens int64 (T + 1,), inputs are tokens[:-1] and
targets tokens[1:], and mask bool (T,) is true for targets that count, or float32 (T,), how much. (A packed sample or a
pair is a list of these.)
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from ..cli.errors import UserError
from ..cli.parser import counted
from .binidx import BinidxDataset
from .masks import Mask, undesirable
from .recorded import Vocabulary

BUCKET, RUN = 512, 16  # documents that are sorted by length together, and those of similar length that stay together
Units = range | np.ndarray
Document = tuple[torch.Tensor, torch.Tensor]  # its tokens (T + 1,) and its mask (T,)
Sample = Document | list[Document]


def collate(rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Make a batch: [(tokens (T_i + 1,), mask (T_i,))] -> tokens, targets, mask (B, T), T the longest, and counted; and
    weights (B, T), if the masks are weights.

    Rows that are lists of such documents give (1, sum of T_i) and cu_seqlens.
    """
    packed = [document for row in rows if isinstance(row, list) for document in row]
    if packed:
        return collate_packed(packed)
    documents = [row for row in rows if isinstance(row, tuple)]
    length = max(len(mask) for _, mask in documents)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    weigh = any(mask.is_floating_point() for _, mask in documents)  # of a mixture perhaps some
    mask = torch.zeros(len(rows), length, dtype=torch.float32 if weigh else documents[0][1].dtype)
    for row, (sequence, counts) in enumerate(documents):
        size = len(counts)
        tokens[row, :size], targets[row, :size], mask[row, :size] = sequence[:-1], sequence[1:], counts
    return {"tokens": tokens, "targets": targets} | mask_entries(mask)


def collate_packed(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """[(tokens (T_i + 1,), mask (T_i,))] -> tokens, targets, mask (1, sum of T_i), counted, cu_seqlens (n + 1,); and
    weights (1, sum of T_i), or labels (n,), if the masks have them."""
    masks = [mask for _, mask in documents]
    batch = {
        "tokens": torch.cat([tokens[:-1] for tokens, _ in documents])[None],
        "targets": torch.cat([tokens[1:] for tokens, _ in documents])[None],
        "cu_seqlens": torch.tensor([0, *map(len, masks)]).cumsum(0),
        **mask_entries(torch.cat(masks)[None]),
    }
    if masks[0].dtype == torch.uint8:
        batch["labels"] = torch.tensor([not undesirable(mask) for mask in masks])
    return batch


def mask_entries(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The entries of a batch with a mask (B, T): mask, counted, and weights if the mask is of weights."""
    counts = mask != 0
    found = {"mask": counts, "counted": positions(counts)}
    return found | {"weights": mask} if mask.is_floating_point() else found


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The positions at which a mask (B, T) is true, in its B * T elements: int64 (n,)."""
    return mask.flatten().nonzero()[:, 0]


class Permutation:
    """A bijection of range(size) that depends only on `key`: permutation[i] in constant time and memory.

    Cubing is a bijection modulo a prime that is 2 modulo 3, the idea of RWKV-LM's "magic prime".
    Here the prime is the first one at or above size. A value outside range(size) passes through the
    map again until it falls inside, so that no sample is left out. Two rounds of a (x + b)^3 + c,
    their constants hashed from the key, give each key an order of its own.
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self.prime = next(n for n in range(max(size, 2), 2 * size + 8) if n % 3 == 2 and is_prime(n))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=48).digest()
        draw = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]
        prime = self.prime
        self._rounds = [(1 + draw[i] % (prime - 1), draw[i + 1] % prime, draw[i + 2] % prime) for i in (0, 3)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(position)
        value = self._map(position)
        while value >= self.size:
            value = self._map(value)
        return value

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(self.size))

    def _map(self, x: int) -> int:
        for a, b, c in self._rounds:
            x = (a * pow(x + b, 3, self.prime) + c) % self.prime
        return x


def is_prime(n: int) -> bool:
    """True for a prime, by Miller-Rabin with bases for every n below 3.3e24 (Sorenson and Webster 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        if not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True


class Samples(ABC):
    """`units` numbers of things to visit (windows, documents, rows) in `dataset`, each once an epoch.

    `kind` is the word for a sample, `counted` the word for the `size` things that people count: of packed samples,
    rows."""

    dataset: BinidxDataset
    kind = counted = "window"

    def bucket(self, wanted: bool) -> None:  # noqa: B027 (most have nothing to do)
        """Bring rows of similar length together if `wanted`, from before the first sample is read."""

    def __init__(self, units: Units, seed: int | None) -> None:
        self.seed = seed
        self.notes: list[str] = []
        self.row_notes: list[str] = []  # the notes on rows left out, or laid out oddly
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
        """Samples that begin as these do, and that are all in memory or mapped."""
        return self

    @property
    def size(self) -> int:
        """The number of `counted` things that an epoch reads."""
        return len(self)

    @property
    @abstractmethod
    def tokens(self) -> int:
        """The input tokens of an epoch."""

    @property
    def targets(self) -> float:
        """The sum of `counts` over an epoch."""
        return sum(map(self.count, range(len(self))))

    def counts(self, first: int, last: int) -> np.ndarray:
        """`count` of samples first to last - 1, float64."""
        return np.array([self.count(n) for n in range(first, last)], dtype=float)

    @property
    def parts(self) -> Sequence["Samples"]:
        """The samples of each data set by itself."""
        return [self]

    def seen(self, number: int) -> dict[str, float]:
        """The times that `number` samples in a row read each data set, by its name; "" for one alone."""
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
        """The unit that sample n visits."""
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

    @property
    def targets(self) -> float:
        return super().targets if self._mask else self.tokens  # the overlap counted twice, as in counts

    def counts(self, first: int, last: int) -> np.ndarray:
        return super().counts(first, last) if self._mask else np.full(last - first, float(self.ctx_len))

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

    @property
    def targets(self) -> float:
        return super().targets if self._mask else self.tokens

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
        if self._mask is None:
            return ""
        lost = bare = 0
        for index in np.flatnonzero(self.dataset.sizes > self.ctx_len + 1).tolist():
            start, size = self.dataset.start(index), int(self.dataset.sizes[index])
            counts = self._mask(start + 1, start + size) != 0
            behind = int(np.count_nonzero(counts[self.ctx_len :]))
            lost += behind
            bare += bool(behind) and not counts[: self.ctx_len].any()
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

    If that is wanted and there is a seed, the order is bucketed, however many rows share a batch. If each row is alone
    in its batch, nothing is padded, and the order is a plain shuffle.
    """

    def bucket(self, wanted: bool) -> None:
        self.bucketed = wanted and self.seed is not None


class SingleSamples(DocumentSamples):
    """Dataload "only": one document at a time, never padded."""


class PackedSamples(DocumentSamples):
    """Dataload "pack": rows of documents with at most ctx_len targets in all.

    Sample n is a list of (tokens (T_i + 1,), mask (T_i,)), one for each document. The documents of a row follow from
    the lengths and the seed; each epoch visits the rows in its own order. Documents longer than ctx_len are cut, as
    with "pad".
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
    by_free: defaultdict[int, list[int]] = defaultdict(list)  # {free: rows with so much room left}
    free_sizes: list[int] = []  # those with rows, sorted
    for position in np.argsort(-lengths, kind="stable"):
        length = int(lengths[position])
        at = bisect_left(free_sizes, length)
        if at < len(free_sizes):
            free = free_sizes[at]
            row = by_free[free].pop()
            if not by_free[free]:
                del free_sizes[at]
        else:
            free, row = room, len(rows)
            rows.append([])
        rows[row].append(int(position))
        free -= length
        if free:
            if not by_free[free]:
                insort(free_sizes, free)
            by_free[free].append(row)
    return rows


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
