"""Counts rows that cannot be read by kind, and keeps the first of each."""

import re
from collections import Counter
from collections.abc import Iterator

from ..cli.errors import in_line
from ..cli.parser import counted

MOST_KINDS = 100  # kinds that are told apart
SHOWN = 8  # kinds that a message lists
# the parts in which messages of one kind differ
VARIES = re.compile(r"(?<!\w)'(?:\\.|[^'\\])*'…?|\"(?:\\.|[^\"\\])*\"…?|\(.*\)|\d+|\b(?:None|True|False)\b|\[…\]|\{…\}")


class BadRows:
    """Counts rows by kind, in the order in which the kinds came up; messages of one kind differ only in VARIES."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # kind -> where its first row stands, and what is wrong with it

    def add(self, place: str, message: str) -> None:
        self._add(VARIES.sub("…", message), in_line(f"{place}: {message}"), 1)

    def add_all(self, other: "BadRows") -> None:
        for kind, number in other.counts.items():
            self._add(kind, other.first[kind], number)

    def _add(self, kind: str, first: str, number: int) -> None:
        if kind not in self.counts and len(self.counts) >= MOST_KINDS:
            kind = "other"
        self.counts[kind] += number
        self.first.setdefault(kind, first)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self, what: str = "") -> Iterator[str]:
        """Yield a heading, with `what` behind the count, and a line for each of the SHOWN most frequent kinds."""
        total, kinds = self.counts.total(), self.counts.most_common(SHOWN)
        which = f", of {len(self.counts)} kinds, the first of each" if len(self.counts) > 1 else ", the first of them"
        yield f"{counted(total, 'bad row')}{what}{which if total > 1 else ''}:"
        for kind, number in kinds:
            yield "  " + (f"{number:,} x  " if total > 1 else "") + self.first[kind]
        if rest := total - sum(number for _, number in kinds):
            yield f"  and {counted(rest, 'row')} of other kinds"
