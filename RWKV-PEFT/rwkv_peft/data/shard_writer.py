"""Writes a data set that may be long, so that a command that was killed goes on: in one set of files, or in shards.

Until it is whole, it grows in the hidden folder `.NAME.unfinished` beside it. Every few seconds the files there are
fsynced, and journal.json notes their sizes and digests, the counts of the rows so far, and how many chunks of the input
they hold. A further command with the same inputs and settings checks the files against the journal, cuts off what was
written since, and goes on behind those chunks.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from os import scandir
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..checkpoints.atomic import fsync, telling_failures, without_empty_folders, write_text
from ..checkpoints.lock import enter
from ..cli.errors import UNREADABLE, UserError
from ..cli.numeric import is_whole
from .encoding import Encoded
from .prefix import ENDINGS, SHARDS, binidx_prefix, prefixes_of, shard_prefix
from .token_files import Growing, Shard, Stale, name_set

JOURNAL, DIGESTS = "journal.json", "digests"
SECONDS = 10.0  # between two notes in the journal


class ShardWriter:
    """Writes PREFIX.bin, PREFIX.idx, PREFIX.mask and PREFIX.weights, and PREFIX.json if `record` is its text; a context
    manager. The files appear, whole, when the block ends without an exception, the index last. A mask of ones is not
    kept, nor are weights of 1, because they say nothing. Raises NotNow if another process is writing the same data set,
    UserError if the files cannot be written.

    With shard_tokens, in shards of at most so many tokens, or of one longer document, and PREFIX.json lists them
    (shards.py). With a `key`, which names the inputs and all settings, it goes on from what a command with the same key
    left: `chunks` of the input are done, and `totals` are their counts. What a refusal ends is removed.
    """

    def __init__(
        self, path: str | Path, vocab_size: int = 65536, record: str | None = None, shard_tokens: int = 0, key: str = ""
    ) -> None:
        self.prefix, self.vocab_size, self.record = binidx_prefix(path), vocab_size, record
        self.shard_tokens, self.key = shard_tokens, key
        self.folder = Path(self.prefix).with_name(f".{Path(self.prefix).name}.unfinished")
        self.chunks, self.totals, self.done = 0, Encoded(), list[dict[str, Any]]()

    def __enter__(self) -> "ShardWriter":
        with ExitStack() as stack:
            stack.enter_context(telling_failures(Path(self.prefix), "nothing was changed there"))
            stack.enter_context(without_empty_folders(self.folder.parent))
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = Path(self.prefix).with_name(f".{Path(self.prefix).name}.lock")
            enter(stack, lock, self.prefix, "another process is writing it", "another", partial(print, file=sys.stderr))
            try:
                self.go_on()
            except (Stale, *UNREADABLE):
                self.begin()
            self._stack = stack.pop_all()
        return self

    @property
    def documents(self) -> int:
        """The number of documents so far."""
        return sum(shard["documents"] for shard in self.done) + len(self.shard.sizes)

    def known(self) -> bytes:
        """The digests of the rows that a command before has written."""
        return self.digests.path.read_bytes()

    def begin(self) -> None:
        remove(self.folder)
        self.folder.mkdir()
        self.chunks, self.totals, self.done = 0, Encoded(), []
        self.shard, self.digests = Shard(self.folder, 1, self.vocab_size), Growing(self.folder / DIGESTS)
        self.noted = time.monotonic()

    def go_on(self) -> None:
        """Take up what the journal notes. Raises Stale, or what reading raises, if that is not there any more, or if
        a stranger's link would lead the writing elsewhere."""
        plain = not self.folder.is_symlink() and all(
            each.is_file(follow_symlinks=False) for each in scandir(self.folder)
        )
        journal = json.loads((self.folder / JOURNAL).read_bytes()) if self.key and plain else {}
        if journal.get("key") != self.key or not self.key:
            raise Stale(self.folder)
        self.chunks, self.done, self.totals = journal["chunks"], journal["done"], Encoded.from_json(journal["totals"])
        counts = [self.chunks, *(shard[name] for shard in self.done for name in ("documents", "tokens"))]
        if not all(is_whole(count, 0) for count in counts):
            raise Stale(self.folder)
        for shard in self.done:
            for name, noted in shard["files"].items():
                if Path(name).name != name or Growing.of(self.folder / name) != noted:
                    raise Stale(self.folder / name)
        self.shard = Shard(self.folder, len(self.done) + 1, self.vocab_size, journal["shard"])
        self.digests = Growing(self.folder / DIGESTS, journal["digests"])
        self.noted = time.monotonic()

    def add(self, tokens: ArrayLike, mask: ArrayLike | None = None, weight: float = 1.0) -> None:
        """Append one document: token ids (n,), its mask (n,), None if all of them count, and its weight."""
        ids = np.asarray(tokens, self.shard.dtype)
        counts = np.ones(len(ids), np.uint8) if mask is None else np.asarray(mask, np.uint8)
        self.write(Encoded([len(ids)], [weight], ids.tobytes(), counts.tobytes()))

    def write(self, part: Encoded) -> None:
        """Append the documents of a chunk, beginning a shard when the last one is full."""
        for tokens, sizes, mask, weights in self.cut(part):
            continues = part.continues and sizes is part.sizes
            self.shard.add(tokens, sizes, mask, continues, weights)

    def cut(self, part: Encoded) -> Iterator[tuple[bytes, list[int], bytes, list[float]]]:
        """Yield the documents of a chunk for each of the shards that they belong to."""
        if not self.shard_tokens or part.continues:
            yield part.tokens, part.sizes, part.mask, part.weights
            return
        wide, first, at = self.shard.dtype.itemsize, 0, 0
        ends = np.cumsum(part.sizes, dtype=np.int64)
        while first < len(part.sizes):
            room = self.shard_tokens - self.shard.files[".bin"].size // wide
            last = int(np.searchsorted(ends, at + room, side="right"))
            if last <= first and self.shard.sizes:
                self.next_shard()
                continue
            last = max(last, first + 1)
            end = int(ends[last - 1])
            yield (
                part.tokens[at * wide : end * wide],
                part.sizes[first:last],
                part.mask[at:end],
                part.weights[first:last],
            )
            first, at = last, end

    def next_shard(self) -> None:
        self.done.append(self.shard.complete())
        self.shard = Shard(self.folder, len(self.done) + 1, self.vocab_size)

    def chunk_done(self, totals: Encoded, digests: bytes) -> None:
        """Count a chunk as added, and note it in the journal, with the counts and its rows' digests, if it is time."""
        self.chunks += 1
        self.digests.write(digests)
        if self.key and time.monotonic() - self.noted >= SECONDS:
            journal = {"key": self.key, "chunks": self.chunks, "totals": totals.to_json(), "done": self.done}
            journal |= {"shard": self.shard.save(), "digests": self.digests.save()}
            write_text(self.folder / JOURNAL, json.dumps(journal))
            self.noted = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is None:
            with self._stack:
                try:
                    self.finish()
                except BaseException as failure:
                    self.give_up(failure)
                    raise
                remove(self.folder)
            return False
        self.give_up(error)
        return self._stack.__exit__(kind, error, trace)

    def give_up(self, error: BaseException | None) -> None:
        """Close the files. They stay for the next command unless there is no journal, or it would be refused again."""
        for file in (self.digests, *self.shard.files.values()):
            with suppress(OSError):  # that of a full disk is told already
                file.close()
        if isinstance(error, UserError) or not (self.folder / JOURNAL).exists():
            remove(self.folder)

    def finish(self) -> None:
        """Give all files their names. An old manifest goes first, and the new one comes last."""
        self.done.append(self.shard.complete())
        self.digests.close()
        manifest, old = Path(f"{self.prefix}.json"), prefixes_of(self.prefix)
        names, record = [self.prefix], self.folder / "record"
        if self.shard_tokens:
            names = [shard_prefix(self.prefix, number) for number in range(1, len(self.done) + 1)]
        record.write_text(self.record if self.record and not self.shard_tokens else self.manifest(names))
        fsync(record)
        if self.shard_tokens or old != [self.prefix]:
            manifest.unlink(missing_ok=True)
        for number, (name, shard) in enumerate(zip(names, self.done), 1):
            files = {end: self.folder / f"{number:05}{end}" for end in ENDINGS}
            if self.record and not self.shard_tokens:
                files[".json"] = record
            name_set(files, name, shard["says"])
        beside = {each for each in old if each.startswith(f"{self.prefix}-") and Path(each).parent == manifest.parent}
        for each in {self.prefix, *beside} - {*names}:
            for end in ENDINGS:
                Path(each + end).unlink(missing_ok=True)
        if self.shard_tokens:
            record.replace(manifest)
        fsync(manifest.parent)

    def manifest(self, names: Sequence[str]) -> str:
        """The text of PREFIX.json of a set in shards."""
        shards = [
            {"name": Path(name).name, "documents": shard["documents"], "tokens": shard["tokens"]}
            for name, shard in zip(names, self.done)
        ]
        return json.dumps(json.loads(self.record or "{}") | {SHARDS: shards}) + "\n"


def remove(folder: Path) -> None:
    """Remove a folder, or a link in its place, if it is there."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
