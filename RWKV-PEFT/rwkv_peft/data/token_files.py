"""The files of a token set as they grow, document by document; binidx.py has the format."""

import hashlib
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .binidx import HEADER, MAGIC, TOKEN_TYPES, dtype_code

BLOCK = 1 << 24
Noted = list[int | str]  # the size of a file, and the digest of so many bytes of it


class Writable(Protocol):
    """A file of bytes that grows."""

    def write(self, data: bytes, /) -> object: ...


class TokenFiles:
    """Writes documents to `files`, {ending: file}: .bin, and .mask if with_mask, as they come; sizes and weights stay
    in memory, 8 bytes a document, until the index is written."""

    files: Mapping[str, Writable]

    def __init__(self, vocab_size: int, with_mask: bool) -> None:
        self.code, self.with_mask = dtype_code(vocab_size), with_mask
        self.dtype = np.dtype(TOKEN_TYPES[self.code])
        self.something_masked = False
        self.sizes, self.weights = array("i"), array("f")

    def add(self, tokens: ArrayLike, mask: ArrayLike | None = None) -> None:
        """Append one document: token ids (n,), and its mask (n,) if the writer was made with mask=True."""
        tokens = np.asarray(tokens)
        info = np.iinfo(self.dtype)
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() <= info.max):
            raise UserError(
                f"document {len(self.sizes)}: token ids {tokens.min()}..{tokens.max()} do not fit "
                f"{self.dtype.name}; give the tokenizer's vocab_size to the writer"
            )
        self.add_documents(
            tokens.astype(self.dtype).tobytes(),
            [len(tokens)],
            None if mask is None else np.asarray(mask, dtype=np.uint8).tobytes(),
        )

    def add_documents(
        self,
        tokens: bytes,
        sizes: Sequence[int],
        mask: bytes | None = None,
        continues: bool = False,
        weights: Sequence[float] = (),
    ) -> None:
        """Append documents given as bytes: tokens in this writer's dtype, and a byte of mask a token; weights are those
        of the documents, (): 1 each.

        With continues=True the first of them continues the document before.
        """
        if (mask is not None) != self.with_mask:
            raise ValueError("a mask is due if, and only if, the writer was made with mask=True")
        if mask is not None and len(mask) * self.dtype.itemsize != len(tokens):
            raise ValueError(f"{len(mask)} mask bytes for {len(tokens) // self.dtype.itemsize} tokens")
        self.files[".bin"].write(tokens)
        if mask is not None:
            self.files[".mask"].write(mask)
            self.something_masked |= bool(mask.strip(b"\1"))
        try:
            if continues and self.sizes and sizes:
                self.sizes[-1] += sizes[0]
                sizes, weights = sizes[1:], weights[1:]
            self.sizes.extend(sizes)
            self.weights.extend(weights or [1.0] * len(sizes))
        except OverflowError:
            raise UserError(
                f"document {len(self.sizes) - 1} has more than 2147483647 tokens, the most that "
                "the format holds; split the text into documents"
            ) from None

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
