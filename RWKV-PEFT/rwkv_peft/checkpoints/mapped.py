"""Notices that a file was overwritten while it is mapped, because the mapping then shows the new content.

Who maps a file looks at its Stamp before what was read counts. If a page is lost in between, the process gets SIGBUS,
of which training/ranks/watch.py hears.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..cli.errors import UserError


class Overwritten(UserError):
    """A file was overwritten while it is read; the message says how it differs."""

    def __init__(self, path: str | Path, how: str) -> None:
        super().__init__(f"{path} was overwritten while it is read: it {how}; put the old file back")


class Stamp(NamedTuple):
    """A file's device, inode, size and time of change, which show if it was overwritten or another took its name."""

    device: int
    number: int
    size: int
    changed: int

    @classmethod
    def of(cls, path: str | Path) -> "Stamp":
        """The Stamp of a file as it is now."""
        now = os.stat(path)
        return cls(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)

    def now(self, path: str | Path, by_name: bool = False) -> "Stamp":
        """The Stamp as it is now of the file that had this one. If another took its name it stays, because the old file
        lives as long as it is mapped, unless the file counts that has the name. Raises Overwritten for another size."""
        now = None
        with suppress(OSError):  # it has no name, or cannot be asked
            now = Stamp.of(path)
        if not by_name and (now is None or now[:2] != self[:2]):
            return self
        if now is None or now.size != self.size:
            raise Overwritten(path, f"has {now.size:,} bytes, and had {self.size:,}" if now else "is gone")
        return now


class Mapped:
    """Holds what is mapped from files; stamps are those of the files as they were last judged, by path."""

    stamps: dict[str | Path, Stamp]

    def require_unchanged(self, by_name: bool = False) -> None:
        """Raise UserError if a file has another size by now, or holds what `judge` refuses; with `by_name` also if that
        is true of another file that took its name."""
        for path, before in self.stamps.items():
            if (now := before.now(path, by_name)) != before:
                self.judge(path)
                if not by_name:  # another file may be none that is mapped
                    self.stamps[path] = now

    def judge(self, path: str | Path) -> None:
        """Judge a file anew that was written or touched and has its size still. Raises UserError to refuse it."""
        raise NotImplementedError
