"""Turns text files into token files.

    rwkv-peft preprocess INPUT... --output PREFIX [--tokenizer world|bytes|FILE] [--workers N]

INPUT is .jsonl (a row a line; templates.py lists the forms that are recognised), .json, .csv (the first line names the
fields), .txt (one document a file), .parquet, a folder of .jsonl, .csv or .parquet files, or one that
datasets.save_to_disk wrote. Writes PREFIX.bin and PREFIX.idx, PREFIX.mask if parts of the rows do not count in the
loss, PREFIX.weights if rows have weights, and PREFIX.json, which names the tokenizer; with --shard_tokens in shards,
PREFIX-00001.bin and so on, which PREFIX.json lists. A command that was cut off goes on if it is given again.

    rwkv-peft preprocess --ids "Assistant:"    prints the token ids of a text
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from ..checkpoints.atomic import check_output, temporary_beside
from ..checkpoints.digest import stamp_of
from ..checkpoints.readable import files_below
from ..cli.errors import UserError
from ..cli.parser import counted
from ..cli.streams import bar_seconds
from .binidx import BinidxDataset
from .encode_settings import EncodeSettings
from .encoding import DIGEST, Encoded, encoder
from .order import Permutation
from .prefix import ENDINGS, binidx_prefix
from .preprocess_flags import parse_flags
from .recorded import check_record, record_of, require_own
from .report import describe, laid_out, left_out
from .rows import read_chunks
from .shard_writer import ShardWriter
from .shards import open_dataset
from .templates import read_template
from .tokenizer import load_tokenizer
from .turns import FIELDS
from .workers import encode_all

INLINE_BYTES = 4 << 20
FORMAT = 2  # of the files of a command that was cut off
MOST_COMPARED = 1 << 24  # rows that are compared to count repeated ones, unless they are dropped
SKIP = "--skip_bad_rows leaves such rows out, and counts them"
DIGESTS = np.dtype(f"S{DIGEST}")


def main(argv: list[str]) -> int:
    options = parse_flags(argv)
    if options.ids:
        tokenizer = load_tokenizer(options.tokenizer)
        for text in options.input:
            print(*tokenizer.encode(text))
        return 0
    settings = EncodeSettings(
        options.tokenizer,
        options.append_eod,
        tuple(options.fields),
        read_template(options.template) if options.template else "",
        options.think,
        options.clean_turns,
        options.skip_bad_rows,
    )
    output, tokenizer = binidx_prefix(options.output), encoder(settings).tokenizer
    check_record(output, options.input)
    for end in ENDINGS:
        check_output("--output", output + end, [("an input", path) for path in options.input])
    record = record_of(tokenizer, options.input, options.clean_turns)
    if not options.overwrite:
        require_own(output, record)
    key = key_of(settings, options.split, options.drop_duplicates, options.shard_tokens, options.input)
    writer = ShardWriter(output, tokenizer.vocab_size, record, options.shard_tokens, key)

    def encode(to: str | Path | ShardWriter) -> Encoded:
        return write(options.input, to, settings, options.workers, options.split, sys.stderr, options.drop_duplicates)

    if options.shuffle is None and options.repeat == 1:
        totals = encode(writer)
    else:
        writer.key = ""
        with temporary_beside(Path(output), folder=True) as folder:
            totals = encode(folder / "data")
            rewrite(BinidxDataset(folder / "data"), writer, options.shuffle, options.repeat)
    written = open_dataset(output)
    print(describe(written, totals))
    if options.show:
        from .show import marks_for, show_documents  # by torch, which nothing else here needs

        print(show_documents(written, options.show, tokenizer, marks_for(sys.stdout)))
    return 0


def key_of(settings: EncodeSettings, split: str, drop: bool, shard_tokens: int, inputs: Sequence[str]) -> str:
    """A hash of all that shapes the files of a command, its inputs by name, size and time of change: a command goes on
    from the files that one with the same key left."""
    files = (file for path in inputs for file in files_below(path) if os.path.exists(file))  # reading tells the others
    stamps = [(str(file.resolve()), *stamp_of(file)) for file in files]
    content = [FORMAT, asdict(settings), encoder(settings).tokenizer.vocab_size, split, drop, shard_tokens, stamps]
    return hashlib.blake2b(json.dumps(content).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def write(
    inputs: Sequence[str | Path],
    output: str | Path | ShardWriter,
    settings: EncodeSettings,
    workers: int = 1,
    split: str = "",
    progress: TextIO | None = None,
    drop: bool = False,
) -> Encoded:
    """Encode the inputs into a PREFIX, or by a ShardWriter, which may have a part of them; return an Encoded with the
    counts of all chunks.

    progress is a stream for a progress bar, or None; drop leaves out rows that are the same as an earlier one. Raises
    UserError if inputs cannot be read, if no document is left, and if thinking is asked for and no row has any.
    """
    tokenizer = encoder(settings).tokenizer  # a wrong setting stops here, before any worker starts
    size = sum(Path(path).stat().st_size for path in inputs if Path(path).is_file())
    if 0 < size < INLINE_BYTES:
        workers = 1
    chunks = (chunk for path in inputs for chunk in read_chunks(path, split, tokenizer.cuts_at_lines))
    seen = Seen(0 if drop else MOST_COMPARED)
    # a character counts as a byte of the input, which is near enough for a bar
    bar = tqdm(
        total=size or None,
        desc="tokenizing",
        unit="B",
        unit_scale=True,
        delay=0.5,
        mininterval=bar_seconds(progress or sys.stderr),
        dynamic_ncols=True,
        file=progress,
        disable=progress is None,
    )
    with bar, output if isinstance(output, ShardWriter) else ShardWriter(output, tokenizer.vocab_size) as writer:
        totals = writer.totals
        if writer.chunks:
            seen.add(writer.known())
            bar.write(
                f"going on behind {counted(writer.documents, 'document')} of a command that was cut off", progress
            )
            bar.update(min(totals.counts["characters"], size))
        rest = islice(chunks, writer.chunks, None)
        for part in encode_all(rest, settings, workers, lambda: bool(totals.bad) and not settings.skip_bad_rows):
            repeated = seen.add(part.digests)
            part.counts["dropped" if drop else "repeated"] += int(repeated.sum())
            if drop and repeated.any():
                part.drop(repeated)
            writer.write(part)
            totals.add_counts(part)
            writer.chunk_done(totals, part.digests if len(seen) != seen.most else b"")
            bar.set_postfix_str(counted(writer.documents, "document"), refresh=False)
            bar.update(min(part.counts["characters"], size - bar.n) if size else part.counts["characters"])
        bar.update(size - bar.n if size else 0)
        if totals.bad and not settings.skip_bad_rows:
            raise UserError(*totals.bad.lines(), f"({SKIP})")
        if not writer.documents:
            why = "; ".join(left_out(totals)) or "there is no row" + (f" within {split}" if split else "")
            raise UserError(f"{', '.join(map(str, inputs))}: no document to write: {why}")
        if not totals.counts["counted"] and settings.command != "prompts":
            why = "; ".join(line.removeprefix("note: ") for line in laid_out(totals) + left_out(totals))
            raise UserError(
                f"{', '.join(map(str, inputs))}: no token counts in the loss, so that there is nothing to learn: {why}"
            )
        if settings.think == "on" and not totals.counts["thinking"]:
            raise UserError(
                f"{', '.join(map(str, inputs))}: no row holds thinking, neither <think> … </think> before an answer's "
                f"words nor a field {' or '.join(FIELDS)}; name the field so, or give --think off for answers without "
                "thinking"
            )
    return totals


def rewrite(source: BinidxDataset, writer: ShardWriter, seed: int | None, repeat: int) -> None:
    """Write a BinidxDataset's documents `repeat` times, each time in another order if a seed is given."""
    with writer:
        for turn in range(repeat):
            for index in range(len(source)) if seed is None else Permutation(len(source), seed, turn):
                start, size = source.start(index), int(source.sizes[index])
                mask = b"\1" * size if source.mask is None else source.mask[start : start + size].tobytes()
                weight = 1.0 if source.weights is None else float(source.weights[index])
                writer.write(Encoded([size], [weight], source[index].tobytes(), mask))


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
    return run[np.minimum(np.searchsorted(run, digests), len(run) - 1)] == digests
