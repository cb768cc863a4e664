"""Writes token files; binidx.py has the format.

They grow in a temporary folder beside the set, and get their names when the last document is written: a kill or a full
disk leaves an older set as it was.
"""

import os
from array import array
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..checkpoints.atomic import fsync, temporary_beside
from ..cli.errors import UserError
from .binidx import HEADER, MAGIC, TOKEN_TYPES, dtype_code
from .encoding import Encoded
from .recorded import ENDINGS, binidx_prefix, record_path


class TokenFileWriter:
    """Writes PREFIX.bin, PREFIX.idx, PREFIX.mask and PREFIX.weights, and PREFIX.json if `record` is its text; a context
    manager. The files appear, whole, when the block ends without an exception. A mask of ones is not kept, nor are
    weights of 1. Raises UserError if they cannot be written.
    """

    def __init__(self, path: str | Path, vocab_size: int = 65536, record: str | None = None) -> None:
        self.prefix, self.record, self.code = binidx_prefix(path), record, dtype_code(vocab_size)
        self.dtype = np.dtype(TOKEN_TYPES[self.code])
        # 8 bytes a document, in memory until the index is written
        self.sizes, self.weights, self.masked = array("i"), array("f"), False

    def __enter__(self) -> "TokenFileWriter":
        with ExitStack() as stack:
            self.folder = stack.enter_context(temporary_beside(Path(f"{self.prefix}.bin"), folder=True))
            self.paths = {end: self.folder / f"set{end}" for end in ENDINGS}
            self.tokens, self.mask = (stack.enter_context(open(self.paths[end], "wb")) for end in (".bin", ".mask"))
            self._stack = stack.pop_all()
        return self

    @property
    def documents(self) -> int:
        """The number of documents so far."""
        return len(self.sizes)

    def add(self, tokens: ArrayLike, mask: ArrayLike | None = None, weight: float = 1.0) -> None:
        """Append one document: token ids (n,), its mask (n,), None if all of them count, and its weight."""
        ids = np.asarray(tokens, self.dtype)
        counts = np.ones(len(ids), np.uint8) if mask is None else np.asarray(mask, np.uint8)
        self.write(Encoded([len(ids)], [weight], ids.tobytes(), counts.tobytes()))

    def write(self, part: Encoded) -> None:
        """Append documents."""
        tokens, mask, begin, wide = memoryview(part.tokens), memoryview(part.mask), 0, self.dtype.itemsize
        for size, weight in zip(part.sizes, part.weights):
            end = begin + size
            self.tokens.write(tokens[begin * wide : end * wide])
            self.mask.write(mask[begin:end])
            self.masked |= bool(bytes(mask[begin:end]).strip(b"\1"))
            try:
                self.sizes.append(size)
            except OverflowError:
                raise UserError(
                    f"document {len(self.sizes)} has more than 2147483647 tokens, the most that the format holds; "
                    "split the text into documents"
                ) from None
            self.weights.append(weight)
            begin = end

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._stack:  # which turns a failure to write into a CannotWrite
            if error is not None:
                raise error
            self.complete()
            self._name()

    def complete(self) -> None:
        """Write the index and the weights, and make all files durable."""
        self.tokens.close()
        self.mask.close()
        count, sizes = len(self.sizes), np.array(self.sizes, np.int64)
        pointers = (np.cumsum(sizes) - sizes) * self.dtype.itemsize
        with open(self.paths[".idx"], "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, self.code, count, count + 1))
            index.write(sizes.astype("<i4").tobytes())
            index.write(pointers.astype("<i8").tobytes())
            index.write(np.arange(count + 1, dtype="<i8").tobytes())
        self.paths[".weights"].write_bytes(np.array(self.weights, "<f4").tobytes())
        for path in self.paths.values():
            fsync(path)

    def _name(self) -> None:
        """Give all files their names: the old ones go first, and the new index comes last, so that a kill in between
        leaves a set that is refused. A mask or weights of ones alone are left out."""
        record = record_path(self.prefix)
        for end in ENDINGS:
            Path(self.prefix + end).unlink(missing_ok=True)
        if self.record is None:
            record.unlink(missing_ok=True)
        else:
            path = self.folder / "record"
            path.write_text(self.record)
            fsync(path)
            path.replace(record)
        useful = {".mask": self.masked, ".weights": bool((np.array(self.weights) != 1).any())}
        for end in (".bin", ".mask", ".weights", ".idx"):
            if useful.get(end, True):
                os.replace(self.paths[end], self.prefix + end)
        fsync(record.parent)
