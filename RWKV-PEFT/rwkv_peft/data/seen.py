"""Finds rows that were seen before, by their digests."""

import numpy as np

DIGEST = 16  # bytes
DIGESTS = np.dtype(f"S{DIGEST}")


class Seen:
    """A set of digests that takes DIGEST bytes each, and as much again for a moment while it grows: sorted arrays, each
    more than twice as long as the next. Beyond `most` digests (0: any number) none is added."""

    def __init__(self, most: int = 0) -> None:
        self.most, self.runs = most, list[np.ndarray]()

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def add(self, digests: bytes) -> np.ndarray:
        """Add digests, one behind the other -> for each, whether it was there before, or earlier among them."""
        given = np.frombuffer(digests, DIGESTS)
        new, first = np.unique(given, return_index=True)
        known = np.ones(len(given), dtype=bool)
        known[first] = np.logical_or.reduce([has(run, new) for run in self.runs] or [np.zeros(len(new), dtype=bool)])
        if len(new) and not (self.most and len(self) >= self.most):
            self.runs.append(new[~known[first]])
            while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
                self.runs.append(np.sort(np.concatenate([self.runs.pop(), self.runs.pop()]), kind="stable"))
        return known


def has(run: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Tell of each digest whether a sorted array has it: a bool for each."""
    if not len(run):
        return np.zeros(len(digests), dtype=bool)
    found: np.ndarray = run[np.minimum(np.searchsorted(run, digests), len(run) - 1)] == digests
    return found
