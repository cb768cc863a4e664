"""Writes token files, in one set or in shards; binidx.py has the format.

They grow in a temporary folder beside the set, and get their names when the last document is written: a kill or a full
disk leaves an older set as it was.
"""

import json
import os
import sys
from array import array
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from ..checkpoints.atomic import fsync, temporary_beside
from ..checkpoints.lock import enter
from ..cli.errors import UserError
from .binidx import HEADER, MAGIC, TOKEN_TYPES, dtype_code
from .encoding import Encoded
from .recorded import ENDINGS, SHARDS, binidx_prefix, prefixes_of, record_path, shard_prefix


class ShardWriter:
    """Writes PREFIX.bin, PREFIX.idx, PREFIX.mask and PREFIX.weights, and PREFIX.json if `record` is its text; a context
    manager. The files appear, whole, when the block ends without an exception. A mask of ones is not kept, nor are
    weights of 1. Raises NotNow if another process is writing the same data set, UserError if it cannot be written.

    With shard_tokens, in shards of at most so many tokens, or of one longer document, and PREFIX.json lists them.
    """

    def __init__(
        self, path: str | Path, vocab_size: int = 65536, record: str | None = None, shard_tokens: int = 0
    ) -> None:
        self.prefix, self.vocab_size, self.record = binidx_prefix(path), vocab_size, record
        self.shard_tokens, self.shards = shard_tokens, list[Shard]()

    def __enter__(self) -> "ShardWriter":
        prefix = Path(self.prefix)
        with ExitStack() as stack:
            self.folder = stack.enter_context(temporary_beside(Path(f"{prefix}.bin"), folder=True))
            lock = prefix.with_name(f".{prefix.name}.lock")
            enter(stack, lock, self.prefix, "another process is writing it", "another", partial(print, file=sys.stderr))
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
        """Append the documents of a chunk, beginning a shard when the last one is full."""
        if not self.shard_tokens or part.continues:
            self.shards[-1].add(part.tokens, part.sizes, part.mask, part.weights, part.continues)
            return
        wide, first, at = self.shards[-1].dtype.itemsize, 0, 0
        ends = np.cumsum(part.sizes, dtype=np.int64)
        while first < len(part.sizes):
            shard = self.shards[-1]
            last = int(np.searchsorted(ends, at + self.shard_tokens - shard.length, side="right"))
            if last <= first and shard.sizes:
                shard.complete()
                self._begin_shard()
                continue
            last = max(last, first + 1)
            end = int(ends[last - 1])
            tokens, mask = part.tokens[at * wide : end * wide], part.mask[at:end]
            shard.add(tokens, part.sizes[first:last], mask, part.weights[first:last])
            first, at = last, end

    def _begin_shard(self) -> None:
        self.shards.append(Shard(self.folder, len(self.shards) + 1, self.vocab_size))

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
        """Give all files their names: an old manifest and index go first, and the new ones come last, so that a kill in
        between leaves a set that is refused."""
        manifest, old = record_path(self.prefix), prefixes_of(self.prefix)
        names = [self.prefix]
        if self.shard_tokens:
            names = [shard_prefix(self.prefix, number) for number in range(1, len(self.shards) + 1)]
        if self.shard_tokens or old != names:
            manifest.unlink(missing_ok=True)
        for name in names:
            Path(f"{name}.idx").unlink(missing_ok=True)
        record = self._record(names)
        if record and not self.shard_tokens:
            record.replace(manifest)
        for name, shard in zip(names, self.shards):
            shard.name(name)
        beside = {each for each in old if each.startswith(f"{self.prefix}-") and Path(each).parent == manifest.parent}
        for each in {self.prefix, *beside} - {*names}:
            for end in ENDINGS:
                Path(each + end).unlink(missing_ok=True)
        if record and self.shard_tokens:
            record.replace(manifest)
        fsync(manifest.parent)

    def _record(self, names: Sequence[str]) -> Path | None:
        """The file that becomes PREFIX.json; None if the set has none."""
        text = self.record
        if self.shard_tokens:
            shards = [
                {"name": Path(name).name, "documents": len(shard.sizes), "tokens": shard.length}
                for name, shard in zip(names, self.shards)
            ]
            text = json.dumps(json.loads(self.record or "{}") | {SHARDS: shards}) + "\n"
        if text is None:
            return None
        path = self.folder / "record"
        path.write_text(text)
        fsync(path)
        return path


class Shard:
    """The files of shard `number` in a folder, to which documents are written as they come; their sizes and weights
    stay in memory, 8 bytes a document, until the index is written."""

    def __init__(self, folder: Path, number: int, vocab_size: int) -> None:
        self.code = dtype_code(vocab_size)
        self.dtype = np.dtype(TOKEN_TYPES[self.code])
        self.sizes, self.weights, self.length, self.masked = array("i"), array("f"), 0, False
        self.paths = {end: folder / f"{number:05}{end}" for end in ENDINGS}
        self.tokens, self.mask = open(self.paths[".bin"], "wb"), open(self.paths[".mask"], "wb")

    def add(
        self,
        tokens: bytes | bytearray,
        sizes: Sequence[int],
        mask: bytes | bytearray,
        weights: Sequence[float],
        continues: bool = False,
    ) -> None:
        """Append documents: tokens in this shard's dtype, and a byte of mask a token. If it `continues`, the first of
        them goes on the document before."""
        self.tokens.write(tokens)
        self.mask.write(mask)
        self.length += len(mask)
        self.masked |= bool(mask.strip(b"\1"))
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
            else:
                Path(prefix + end).unlink(missing_ok=True)  # an old mask would not fit
