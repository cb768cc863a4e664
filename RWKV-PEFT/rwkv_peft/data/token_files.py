"""The files of a token set as they grow, document by document; binidx.py has the format."""

import hashlib
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..cli.errors import UserError
from .binidx import HEADER, MAGIC, TOKEN_TYPES, dtype_code

BLOCK = 1 << 24
Noted = list[int | str]  # the size of a file, and the digest of so many bytes of it


class Shard:
    """The files of shard `number` in an unfinished folder, to which documents are written as they come. Their sizes and
    weights stay in memory too, 8 bytes a document, until the index is written; the files lack those of the last
    document, which may go on."""

    def __init__(self, folder: Path, number: int, vocab_size: int, noted: dict[str, Any] | None = None) -> None:
        self.code = dtype_code(vocab_size)
        self.dtype = np.dtype(TOKEN_TYPES[self.code])
        self.something_masked = False
        self.sizes, self.weights = array("i"), array("f")
        self.folder, self.number = folder, number
        known = noted["files"] if noted else {}
        self.files: dict[str, Growing] = {}
        for end in (".bin", ".mask", ".sizes", ".weights"):
            path = folder / f"{number:05}{end}"
            self.files[end] = Growing(path, known.get(path.name))
        self.saved = 0
        if noted:
            for end, values in ((".sizes", self.sizes), (".weights", self.weights)):
                values.frombytes(self.files[end].path.read_bytes())
            self.saved = len(self.sizes)
            self.something_masked = noted["masked"]
            for size, weight in noted["last"]:
                self.sizes.append(size)
                self.weights.append(weight)

    def add(self, tokens: bytes, sizes: Sequence[int], mask: bytes, continues: bool, weights: Sequence[float]) -> None:
        """Append documents given as bytes: tokens in this shard's dtype, and a byte of mask a token. If it `continues`,
        the first of them continues the document before."""
        self.files[".bin"].write(tokens)
        self.files[".mask"].write(mask)
        self.something_masked |= bool(mask.strip(b"\1"))
        try:
            if continues and self.sizes and sizes:
                self.sizes[-1] += sizes[0]
                sizes, weights = sizes[1:], weights[1:]
            self.sizes.extend(sizes)
            self.weights.extend(weights)
        except OverflowError:
            raise UserError(
                f"document {len(self.sizes) - 1} has more than 2147483647 tokens, the most that "
                "the format holds; split the text into documents"
            ) from None

    def save(self) -> dict[str, Any]:
        """Make all documents durable -> what the journal notes of them."""
        last = max(len(self.sizes) - 1, self.saved)
        self.files[".sizes"].write(self.sizes[self.saved : last].tobytes())
        self.files[".weights"].write(self.weights[self.saved : last].tobytes())
        self.saved = last
        return {
            "masked": self.something_masked,
            "last": [*zip(self.sizes[last:], self.weights[last:])],
            "files": {file.path.name: file.save() for file in self.files.values()},
        }

    def complete(self) -> dict[str, Any]:
        """Write the index, and close the files -> what the journal notes of the shard."""
        noted = {file.path.name: file.save() for file in self.files.values() if file.path.suffix in (".bin", ".mask")}
        for file in self.files.values():
            file.close()
        self.files[".sizes"].path.unlink()
        with open(self.path(".idx"), "wb") as index, open(self.path(".weights"), "wb") as weights:
            self.write_index(index, weights)
            for other in (index, weights):
                synced(other)
        noted |= {self.path(end).name: Growing.of(self.path(end)) for end in (".idx", ".weights")}
        tokens = self.files[".bin"].size // self.dtype.itemsize
        return {"documents": len(self.sizes), "tokens": tokens, "says": self.says, "files": noted}

    def path(self, end: str) -> Path:
        return self.folder / f"{self.number:05}{end}"

    @property
    def says(self) -> dict[str, bool]:
        """Tell whether .mask and .weights say something: a set lacks those that do not."""
        weighs = bool((np.frombuffer(self.weights, dtype=np.float32) != 1).any())
        return {".mask": self.something_masked, ".weights": weighs}

    def write_index(self, index: BinaryIO, weights: BinaryIO) -> None:
        """Write what is in memory to the files .idx and .weights."""
        count = len(self.sizes)
        sizes = np.frombuffer(self.sizes, dtype=np.int32) if count else np.zeros(0, np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        pointers = np.concatenate((np.zeros(1, np.int64), ends[:-1])) if count else ends
        index.write(HEADER.pack(MAGIC, 1, self.code, count, count + 1))
        index.write(sizes.astype("<i4").tobytes())
        index.write(pointers.astype("<i8").tobytes())
        index.write(np.arange(count + 1, dtype="<i8").tobytes())
        weights.write(np.frombuffer(self.weights, dtype=np.float32).astype("<f4").tobytes())


def synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def name_set(files: Mapping[str, str | Path], prefix: str, says: Mapping[str, bool]) -> None:
    """Give the files of a set, {ending: path}, their names. The old index is removed first and the new one comes last,
    so that a kill in between leaves a set that is refused, not one that mixes old and new."""
    for end in (".idx", *(end for end, something in says.items() if not something)):  # an old mask would not fit
        Path(prefix + end).unlink(missing_ok=True)
    for end in sorted(files, key=lambda end: end == ".idx"):
        if says.get(end, True):
            os.replace(files[end], prefix + end)


class Stale(Exception):
    """A file does not hold what was noted."""


class Growing:
    """A new file, or one that goes on behind what was noted of it. Raises Stale if it holds something else."""

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
