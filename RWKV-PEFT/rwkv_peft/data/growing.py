"""A file that grows, with the digest of what it holds, so that it can be told later whether it is still there."""

import hashlib
import os
from pathlib import Path

from .token_files import synced

BLOCK = 1 << 24
Noted = list[int | str]  # the size of a file, and the digest of so many bytes of it


class Stale(Exception):
    """A file does not hold what was noted."""


class Growing:
    """A new file at `path`; or one that goes on behind what was noted of it, from which the rest is cut off. Raises
    Stale if it holds something else."""

    def __init__(self, path: Path, noted: Noted | None = None) -> None:
        self.path, self.size, self.digest = path, 0, hashlib.blake2b(digest_size=16)
        self.file = open(path, "wb" if noted is None else "r+b")
        if noted is None:
            return
        while self.size < int(noted[0]) and (block := self.file.read(min(BLOCK, int(noted[0]) - self.size))):
            self._count(block)
        if [self.size, self.digest.hexdigest()] != noted:
            self.file.close()
            raise Stale(path)
        self.file.truncate(self.size)
        self.file.seek(self.size)

    @staticmethod
    def of(path: Path) -> Noted:
        """Take the Noted of a file that is whole: its size and digest."""
        with open(path, "rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while block := file.read(BLOCK):
                digest.update(block)
        return [os.path.getsize(path), digest.hexdigest()]

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._count(data)

    def save(self) -> Noted:
        """Make what is written durable -> what is to be noted of it."""
        synced(self.file)
        return [self.size, self.digest.hexdigest()]

    def close(self) -> None:
        self.file.close()

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        self.digest.update(data)
