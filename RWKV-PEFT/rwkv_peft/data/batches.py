"""Batches from one global sample cursor, so that a run resumes exactly; a thread prefetches them."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from .mixture import Mixture
from .samples import Sample, Samples

TrainBatch = dict[str, Any]  # the tensors of a batch, and the number step_count
Item = TypeVar("Item")


class TrainBatches:
    """An endless iterable of micro batches for one of `groups`: a rank, or several that share their rows.

    With the cursor at c when an optimizer step begins, row b of micro batch a of group g is sample
    c + (a * groups + g) * micro_bsz + b, and the step moves the cursor by
    micro_bsz * groups * accumulate: every number of groups, rows and micro batches with the same
    product reads the same samples in the same step, given the same order of samples. The order depends on the seed, and
    with --dataload pad also on whether rows share a batch (micro_bsz above 1, samples.py): then 1 row x 8 micro batches
    reads other samples than 8 rows x 1, but 2 x 4 reads the same as 8 x 1.

    Each batch is a dict:
    - tokens, targets: int64 (B, T)
    - mask: bool (B, T), the targets that count; rows are padded with token 0, which never counts
    - weights: float32 (B, T), how much they count, only if documents have weights
    - counted: int64 (n,), the positions in B * T of these targets, made here because a GPU would have to be waited for
    - step_count: the counted targets of the whole optimizer step, over all groups and micro batches; or their weights'
      sum
    - sources, of_source: of several data files {name: its share of step_count}, {} of one; and bool (files, n), which
      of `counted` are of each
    - samples, first: the samples, and the number of the batch's first
    - cu_seqlens: int64 (documents + 1,), only if samples are lists of documents, which lie one behind the other in a
      single row: the positions where they begin, and the end
    - labels: bool (documents,), only of labelled answers: true for each document with a desirable answer

    The first step begins at sample samples_seen.
    """

    def __init__(
        self,
        samples: Samples,
        micro_bsz: int,
        group: int = 0,
        groups: int = 1,
        accumulate: int = 1,
        samples_seen: int = 0,
        read_ahead: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.samples, self.micro_bsz, self.group, self.groups = samples, micro_bsz, group, groups
        self.accumulate, self.samples_seen = accumulate, samples_seen
        self.read_ahead, self.pin_memory = read_ahead, pin_memory
        self.step_samples = micro_bsz * groups * accumulate
        self.notes = list(samples.notes)
        if len(samples) < self.step_samples:
            self.notes.append(
                f"an optimizer step takes {self.step_samples} samples and the data has {len(samples)}: "
                "a step goes on into the following epochs"
            )

    def batch(self, cursor: int, micro_batch: int) -> TrainBatch:
        """Micro batch `micro_batch` of this group in the optimizer step that begins at sample `cursor`."""
        first = cursor + (micro_batch * self.groups + self.group) * self.micro_bsz
        rows = [self.samples[first + row] for row in range(self.micro_bsz)]
        batch = self.samples.collate(rows)
        if isinstance(self.samples, Mixture):
            numbers = torch.tensor([self.samples.source(first + row) for row in range(self.micro_bsz)])
            counted_of = numbers[row_of(batch["counted"], rows, batch["tokens"].shape[1])]
            batch["of_source"] = counted_of == torch.arange(len(self.samples.sources))[:, None]
        if self.pin_memory:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch | {"samples": self.samples, "first": first}

    def first_counted(self) -> TrainBatch:
        """The first micro batch with a target that counts; samples of build_samples have at least one."""
        starts = range(0, len(self.samples), self.micro_bsz)
        return self.batch(next(n for n in starts if any(map(self.samples.count, range(n, n + self.micro_bsz)))), 0)

    def step_count(self, cursor: int) -> float:
        """The counted targets of the optimizer step that begins at sample `cursor`, or the sum of their weights."""
        return sum(self.samples.count(n) for n in range(cursor, cursor + self.step_samples))

    def shares(self, cursor: int) -> dict[str, float]:
        """{data file: its share of step_count}, of several files; {} of one."""
        if not isinstance(self.samples, Mixture):
            return {}
        counts = dict.fromkeys(self.samples.sources, 0.0)
        names = list(counts)
        for n in range(cursor, cursor + self.step_samples):
            counts[names[self.samples.source(n)]] += self.samples.count(n)
        return {name: count / (sum(counts.values()) or 1.0) for name, count in counts.items()}

    def _batches(self) -> Iterator[TrainBatch]:
        cursor = self.samples_seen
        while True:
            of_step = {"step_count": self.step_count(cursor), "sources": self.shares(cursor)}
            for micro_batch in range(self.accumulate):
                yield self.batch(cursor, micro_batch) | of_step
            cursor += self.step_samples

    def __iter__(self) -> Generator[TrainBatch, None, None]:
        return read_ahead(self._batches(), self.read_ahead)


class EvalBatches:
    """Yields every sample once, for one of `groups`, for validation.

    Batches are dicts of tokens, targets, mask, counted, cu_seqlens, samples and first as TrainBatches gives them. All
    groups get the same number of batches, because collective operations need it; rows that fill up the last ones do not
    count.
    """

    def __init__(self, samples: Samples, micro_bsz: int, group: int = 0, groups: int = 1) -> None:
        self.samples, self.micro_bsz, self.group, self.groups = samples, micro_bsz, group, groups

    def __len__(self) -> int:
        return -(-len(self.samples) // (self.micro_bsz * self.groups))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            first = (index * self.groups + self.group) * self.micro_bsz
            batch = self.samples.collate([self._row(n) for n in range(first, first + self.micro_bsz)])
            yield batch | {"samples": self.samples, "first": first}

    def _row(self, n: int) -> Sample:
        if n < len(self.samples):
            return self.samples[n]
        filler = self.samples[0]
        if isinstance(filler, list):
            return [(tokens, torch.zeros_like(mask)) for tokens, mask in filler]
        return filler[0], torch.zeros_like(filler[1])


def row_of(counted: torch.Tensor, rows: Sequence[Sample], length: int) -> torch.Tensor:
    """The row of each of the positions `counted` (n,) in a batch of rows, which are `length` each unless packed."""
    lengths = [sum(len(mask) for _, mask in row) if isinstance(row, list) else length for row in rows]
    return torch.bucketize(counted, torch.tensor(lengths).cumsum(0), right=True)


def read_ahead(iterable: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """Yield from `iterable`, `depth` items of which a thread prefetches (0: no thread). Its exceptions are raised here.

    The thread ends when the generator is closed or the main thread ends; it is no daemon, because a daemon would be cut
    off inside torch, which can abort the process.
    """
    if depth == 0:
        yield from iterable
        return
    iterator, reader = iter(iterable), ThreadPoolExecutor(1, "read-ahead")
    try:
        ahead = deque(reader.submit(next, iterator, None) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(reader.submit(next, iterator, None))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)
