"""Samples of several data sets: mixed by shares of the tokens that count, or one set after the other."""

import math
from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from ..cli.parser import counted
from .samples import Sample, Samples

BLOCK = 512  # samples that are put in order together
HALVINGS = 50  # of a stretch of time at most: many samples without a target that counts may share a time
ROUNDING = 1e-6  # of a number of samples, by which floating point may be off


class Several(Samples):
    """Samples of several sources by name, `length` an epoch; kind, seed and vocabulary are the first source's."""

    def __init__(self, sources: Mapping[str, Samples], length: int) -> None:
        first = next(iter(sources.values()))
        self.sources, self.dataset, self.kind, self.counted = sources, first.dataset, first.kind, first.counted
        super().__init__(range(length), first.seed)
        self.vocabulary = first.vocabulary
        self.notes += [f"{name}: {note}" for name, source in sources.items() for note in source.notes]

    @abstractmethod
    def place(self, n: int) -> tuple[Samples, int]:
        """Sample n -> its source, and its number there."""

    def source(self, n: int) -> int:
        """The number of the source of sample n."""
        part = self.place(n)[0]
        return next(number for number, each in enumerate(self.parts) if each is part)

    @property
    def parts(self) -> Sequence[Samples]:
        return list(self.sources.values())

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def __getitem__(self, n: int) -> Sample:
        source, number = self.place(n)
        return source[number]

    def count(self, n: int) -> float:
        source, number = self.place(n)
        return source.count(number)


class Course:
    """The time of each sample of a source, in counted targets of the whole mixture from its beginning: the middle of
    the sample's own targets among those of its source, over the source's share.

    Targets are summed up from the beginning of an epoch as far as they are needed, BLOCK samples at a time."""

    def __init__(self, source: Samples, share: float, targets: float) -> None:
        self.source, self.share, self.targets = source, share, targets  # of an epoch
        self._counts = lru_cache(maxsize=8)(self._make_counts)
        self._begins = lru_cache(maxsize=3)(lambda epoch: [0.0])

    def _make_counts(self, epoch: int, block: int) -> np.ndarray:
        begin, end = (min(each * BLOCK, len(self.source)) for each in (block, block + 1))
        return self.source.counts(epoch * len(self.source) + begin, epoch * len(self.source) + end)

    def _begin(self, epoch: int, block: int) -> float:
        """The targets that count before a block of an epoch."""
        begins = self._begins(epoch)
        while len(begins) <= block:
            begins.append(begins[-1] + float(self._counts(epoch, len(begins) - 1).cumsum()[-1]))
        return begins[block]

    def _time(self, epoch: int, targets: Any) -> Any:
        """The time at which so many targets of an epoch are read, in the same order however sums are rounded."""
        return (epoch * self.targets + np.minimum(targets, self.targets)) / self.share

    def _times(self, epoch: int, block: int) -> np.ndarray:
        counts = self._counts(epoch, block)
        times: np.ndarray = self._time(epoch, self._begin(epoch, block) + counts.cumsum() - counts / 2)
        return times

    def before(self, time: float) -> int:
        """The number of samples before a time."""
        epoch = math.ceil(time * self.share / self.targets) - 1
        epoch += int(self._time(epoch + 1, 0.0) < time) - int(self._time(epoch, 0.0) >= time)
        if epoch < 0:
            return 0
        begins, last = self._begins(epoch), (len(self.source) - 1) // BLOCK
        while len(begins) <= last and self._time(epoch, begins[-1]) < time:
            self._begin(epoch, len(begins))
        # the last block that begins before the time
        block = bisect_left(begins, time, key=lambda targets: float(self._time(epoch, targets))) - 1
        place = block * BLOCK + int(self._times(epoch, block).searchsorted(time))
        return epoch * len(self.source) + place

    def between(self, first: int, last: int) -> np.ndarray:
        """The times of samples first to last - 1."""
        parts = [np.empty(0)]
        while first < last:
            epoch, place = divmod(first, len(self.source))
            times = self._times(epoch, place // BLOCK)[place % BLOCK :][: last - first]
            parts, first = [*parts, times], first + len(times)
        return np.concatenate(parts)


class Mixture(Several):
    """A stream in which each source has its share of the targets that count, as even as whole samples allow: of any
    samples in a row, a source has its share to within a sample of its own and one of each other.

    Samples are merged in the order of their Courses, so that a sample depends on its number only. An epoch reads as
    many counted targets as the sources hold; a source goes through epochs of its own. replay, if it is not 0, is the
    share of the last source, and an epoch then reads as many targets of the others as these hold.
    """

    def __init__(self, sources: Mapping[str, Samples], shares: Sequence[float], replay: float = 0.0) -> None:
        targets = [source.targets for source in sources.values()]
        own = targets[:-1] if replay else targets
        self.shares = shares_of(shares or own)
        if replay:
            self.shares = [*(share * (1 - replay) for share in self.shares), replay]
        means = [held / len(source) for held, source in zip(targets, sources.values())]
        each = [share / mean for share, mean in zip(self.shares, means)]  # samples, for a target of the mixture
        self._rate = sum(each)
        wanted = sum(own) / (1 - replay) * self._rate
        # with replay, all of the others once
        length = math.ceil(wanted - ROUNDING) if replay else max(1, round(wanted))
        self._courses = [Course(*each) for each in zip(sources.values(), self.shares, targets)]
        self._schedule = lru_cache(maxsize=4)(self._make_schedule)
        self.of_samples = dict(zip(sources, (part / self._rate for part in each)))
        super().__init__(sources, length)
        read = self.seen(length)
        shown = [
            f"{share:.1%} of the counted tokens are of {name}, read {read[name]:.3g} times an epoch"
            for name, share in zip(sources, self.shares)
        ]
        if replay:
            shown[-1] += " (--replay)"
        self.notes = shown + self.notes

    def place(self, n: int) -> tuple[Samples, int]:
        number, sample = self._schedule(n // BLOCK)[n % BLOCK]
        return self.parts[number], int(sample)

    def _make_schedule(self, block: int) -> np.ndarray:
        """The numbers of the sources, and of their samples, in samples [BLOCK block, BLOCK (block + 1)): (BLOCK, 2)."""
        first = block * BLOCK
        begin, end = self._around(first)[0], self._around(first + BLOCK)[1]
        columns = []
        for number, course in enumerate(self._courses):
            start, stop = course.before(begin), course.before(end)
            columns.append((course.between(start, stop), np.full(stop - start, number), np.arange(start, stop)))
        times, sources, numbers = map(np.concatenate, zip(*columns))
        order = np.lexsort((sources, times))[first - self._before(begin) :][:BLOCK]
        return np.stack([sources[order], numbers[order]], axis=1)

    def _before(self, time: float) -> int:
        return sum(course.before(time) for course in self._courses)

    def _around(self, number: int) -> tuple[float, float]:
        """Times before which at most, and at least, `number` samples are read, some BLOCK samples apart."""
        begin = end = number / self._rate
        width = BLOCK / self._rate
        while self._before(begin) > number:
            begin, width = begin - width, 2 * width
        while self._before(end) < number:
            end, width = end + width, 2 * width
        for _ in range(HALVINGS):
            if self._before(end) - self._before(begin) <= BLOCK:
                break
            middle = (begin + end) / 2
            begin, end = (middle, end) if self._before(middle) <= number else (begin, middle)
        return begin, end

    def seen(self, number: int) -> dict[str, float]:
        return {name: number * self.of_samples[name] / len(source) for name, source in self.sources.items()}


class Joined(Several):
    """Each sample of each source once, one source after the other."""

    def __init__(self, sources: Mapping[str, Samples]) -> None:
        self._ends = list(accumulate(map(len, sources.values())))
        super().__init__(sources, self._ends[-1])
        self.notes.insert(
            0, ", ".join(f"{counted(len(source), source.kind)} of {name}" for name, source in sources.items())
        )

    def place(self, n: int) -> tuple[Samples, int]:
        n %= len(self)
        number = bisect_right(self._ends, n)
        return self.parts[number], n - ([0, *self._ends][number])


def shares_of(numbers: Sequence[float]) -> list[float]:
    """Numbers as parts of their sum, equal for 7 3 and 0.7 0.3: a decimal is taken as it is written."""
    whole = [Fraction(repr(number)) for number in numbers]
    return [float(number / sum(whole)) for number in whole]
