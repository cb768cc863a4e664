"""Samples of several data sets: mixed by shares of the tokens, or one set after the other."""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate

from ..cli.parser import counted
from .samples import Sample, Samples

WHOLE = 1 << 32  # shares are whole numbers of this part, so that every machine mixes alike
HALF = WHOLE // 2
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


class Mixture(Several):
    """A stream in which each source has its share of the tokens, as even as whole samples allow: of any samples in a
    row, a source has its share to within a sample for each source before it.

    The order follows from the shares alone: a sample depends on its number only. An epoch reads as many tokens as the
    sources hold; a source goes through epochs of its own. replay, if it is not 0, is the share of the last source, and
    an epoch then reads as many tokens of the others as these hold.
    """

    def __init__(self, sources: Mapping[str, Samples], shares: Sequence[float], replay: float = 0.0) -> None:
        tokens = [source.tokens for source in sources.values()]
        own = tokens[:-1] if replay else tokens
        self.shares = shares_of(shares or own)
        if replay:
            self.shares = [*(share * (1 - replay) for share in self.shares), replay]
        means = [held / len(source) for held, source in zip(tokens, sources.values())]
        each = [share / mean for share, mean in zip(self.shares, means)]  # samples, for a token of the mixture
        wanted = sum(own) / (1 - replay) * sum(each)
        # with replay, all of the others once
        length = math.ceil(wanted - ROUNDING) if replay else max(1, round(wanted))
        rest = reversed(list(accumulate(reversed(each))))
        # of the samples that the sources before it leave
        self._cuts = [round(WHOLE * part / left) for part, left in zip(each, rest)]
        self.of_samples = dict(zip(sources, (part / sum(each) for part in each)))
        super().__init__(sources, length)
        read = self.seen(length)
        shown = [
            f"{share:.1%} of the tokens are of {name}, read {read[name]:.3g} times an epoch"
            for name, share in zip(sources, self.shares)
        ]
        if replay:
            shown[-1] += " (--replay)"
        self.notes = shown + self.notes

    def place(self, n: int) -> tuple[Samples, int]:
        for cut, source in zip(self._cuts, self.parts):
            before, after = (n * cut + HALF) // WHOLE, ((n + 1) * cut + HALF) // WHOLE
            if after > before:
                return source, before
            n -= before
        raise AssertionError("the last source takes what is left")

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
