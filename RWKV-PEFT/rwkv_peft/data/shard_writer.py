"""Writes token files, in one set or in shards; binidx.py has the format.

They grow in a temporary folder beside the set, and get their names when the last document is written: a kill or a full
disk leaves an older set as it was.
"""

import json
import os
from array import array
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from ..checkpoints.atomic import fsync, temporary_beside
from ..cli.errors import UserError
from .binidx import HEADER, MAGIC, TOKEN_TYPES, dtype_code
from .encoding import Encoded
from .recorded import ENDINGS, SHARDS, binidx_prefix, prefixes_of, record_path, shard_prefix


class ShardWriter:
    """Writes PREFIX.bin, PREFIX.idx, PREFIX.mask and PREFIX.weights, and PREFIX.json if `record` is its text; a context
    manager. The files appear, whole, when the block ends without an exception. A mask of ones is not kept, nor are
    weights of 1. Raises UserError if they cannot be written.

    With shard_tokens, in shards of at most so many tokens, or of one longer document, and PREFIX.json lists them.
    """

    def __init__(
        self, path: str | Path, vocab_size: int = 65536, record: str | None = None, shard_tokens: int = 0
    ) -> None:
        self.prefix, self.vocab_size, self.record = binidx_prefix(path), vocab_size, record
        self.shard_tokens, self.shards = shard_tokens, list[Shard]()

    def __enter__(self) -> "ShardWriter":
        with ExitStack() as stack:
            self.folder = stack.enter_context(temporary_beside(Path(f"{self.prefix}.bin"), folder=True))
            self._begin_shard()
            self._stack = stack.pop_all()
        return self

    @property
    def documents(self) -> int:
        """The number of documents so far."""
        return sum(len(shard.sizes) for shard in self.shards)

    def add(self, tokens: ArrayLike, mask: ArrayLike | None = None, weight: float = 1.0) -> None:
        """Append one document: token ids (n,), its mask (n,), None if all of them count, and its weight."""
        ids = np.asarray(tokens, self.shards[-1].dtype)
        counts = np.ones(len(ids), np.uint8) if mask is None else np.asarray(mask, np.uint8)
        self.write(Encoded([len(ids)], [weight], ids.tobytes(), counts.tobytes()))

    def write(self, part: Encoded) -> None:
        """Append documents, beginning a shard when one is full."""
        tokens, mask, begin = memoryview(part.tokens), memoryview(part.mask), 0
        for size, weight in zip(part.sizes, part.weights):
            end, shard = begin + size, self.shards[-1]
            if self.shard_tokens and shard.sizes and shard.length + size > self.shard_tokens:
                shard.complete()
                shard = self._begin_shard()
            wide = shard.dtype.itemsize
            shard.add(tokens[begin * wide : end * wide], mask[begin:end], weight)
            begin = end

    def _begin_shard(self) -> "Shard":
        self.shards.append(Shard(self.folder, len(self.shards) + 1, self.vocab_size))
        return self.shards[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            self.shards[-1].close()
            return self._stack.__exit__(kind, error, trace)
        with self._stack:
            self.shards[-1].complete()
            self._name()
        return False

    def _name(self) -> None:
        """Give all files their names: the old ones go first, and each new index comes last, so that a kill in between
        leaves a set that is refused."""
        manifest, old, names = record_path(self.prefix), prefixes_of(self.prefix), [self.prefix]
        if self.shard_tokens:
            names = [shard_prefix(self.prefix, number) for number in range(1, len(self.shards) + 1)]
        beside = {each for each in old if each.startswith(f"{self.prefix}-") and Path(each).parent == manifest.parent}
        for each in {self.prefix, *names, *beside}:
            for end in ENDINGS:
                Path(each + end).unlink(missing_ok=True)
        if (text := self._record(names)) is None:
            manifest.unlink(missing_ok=True)
        else:
            path = self.folder / "record"
            path.write_text(text)
            fsync(path)
            path.replace(manifest)
        for name, shard in zip(names, self.shards):
            shard.name(name)
        fsync(manifest.parent)

    def _record(self, names: Sequence[str]) -> str | None:
        """The text of PREFIX.json; None if the set has none."""
        if not self.shard_tokens:
            return self.record
        shards = [
            {"name": Path(name).name, "documents": len(shard.sizes), "tokens": shard.length}
            for name, shard in zip(names, self.shards)
        ]
        return json.dumps(json.loads(self.record or "{}") | {SHARDS: shards}) + "\n"


class Shard:
    """The files of shard `number` in a folder, to which documents are written as they come; their sizes and weights
    stay in memory, 8 bytes a document, until the index is written."""

    def __init__(self, folder: Path, number: int, vocab_size: int) -> None:
        self.code = dtype_code(vocab_size)
        self.dtype = np.dtype(TOKEN_TYPES[self.code])
        self.sizes, self.weights, self.length, self.masked = array("i"), array("f"), 0, False
        self.paths = {end: folder / f"{number:05}{end}" for end in ENDINGS}
        self.tokens, self.mask = open(self.paths[".bin"], "wb"), open(self.paths[".mask"], "wb")

    def add(self, tokens: memoryview, mask: memoryview, weight: float) -> None:
        """Append a document: tokens in this shard's dtype, and a byte of mask a token."""
        self.tokens.write(tokens)
        self.mask.write(mask)
        self.length += len(mask)
        self.masked |= bool(bytes(mask).strip(b"\1"))
        try:
            self.sizes.append(len(mask))
        except OverflowError:
            raise UserError(
                f"document {len(self.sizes)} has more than 2147483647 tokens, the most that the format holds; split "
                "the text into documents"
            ) from None
        self.weights.append(weight)

    def close(self) -> None:
        """Close the files of a set that is given up."""
        for file in (self.tokens, self.mask):
            with suppress(OSError):  # a full disk has raised already
                file.close()

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

    def name(self, prefix: str) -> None:
        """Give the files the names of a set PREFIX, the index last. A mask or weights of ones alone are left out."""
        kept = {".mask": self.masked, ".weights": bool((np.array(self.weights) != 1).any())}
        for end in (".bin", ".mask", ".weights", ".idx"):
            if kept.get(end, True):
                os.replace(self.paths[end], prefix + end)
