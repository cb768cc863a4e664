"""Turns text files into token files.

    rwkv-peft preprocess INPUT... --output PREFIX [--tokenizer world|bytes|FILE] [--workers N]

INPUT is .jsonl (a row a line; layouts.py lists the forms), .json, .csv (the first line names the
fields), .txt (one document a file), .parquet, a folder of .jsonl, .csv or .parquet files, or one that
datasets.save_to_disk wrote. Writes PREFIX.bin and PREFIX.idx, PREFIX.mask if parts of the rows do not count in the
loss, PREFIX.weights if rows have weights, and PREFIX.json, which names the tokenizer; with --shard_tokens in shards,
PREFIX-00001.bin and so on, which PREFIX.json lists.

    rwkv-peft preprocess --ids "Assistant:"    prints the token ids of a text
"""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from ..checkpoints.atomic import check_output
from ..children import elsewhere
from ..cli.errors import UserError, bar_seconds
from ..cli.parser import counted
from .binidx import open_dataset
from .chat import THINKING
from .encoding import Encoded, EncodeSettings, encode_chunk, encoder
from .layouts import read_template
from .preprocess_flags import parse_flags
from .recorded import ENDINGS, binidx_prefix, check_record, record_of
from .report import describe, laid_out, left_out, show_documents
from .rows import Chunk, read_chunks
from .shard_writer import ShardWriter
from .tokenizer import load_tokenizer

INLINE_BYTES = 4 << 20
MOST_COMPARED = 1 << 22  # rows that are compared to count repeated ones, unless they are dropped
SKIP = "--skip_bad_rows leaves such rows out, and counts them"


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
    for end in ENDINGS:
        check_output("--output", output + end, [("an input", path) for path in options.input])
    record = record_of(tokenizer, options.input, options.clean_turns)
    check_record(output, options.input, record, options.overwrite)
    writer = ShardWriter(output, tokenizer.vocab_size, record, options.shard_tokens)
    totals = write(options.input, writer, settings, options.workers, options.split, sys.stderr, options.drop_duplicates)
    written = open_dataset(output)
    print(describe(written, totals))
    if options.show:
        print(show_documents(written, options.show, tokenizer))
    return 0


def write(
    inputs: Sequence[str | Path],
    output: str | Path | ShardWriter,
    settings: EncodeSettings,
    workers: int = 1,
    split: str = "",
    progress: TextIO | None = None,
    drop: bool = False,
) -> Encoded:
    """Encode the inputs into a PREFIX, or by a ShardWriter; return an Encoded with the counts of all chunks.

    progress is a stream for a progress bar, or None; drop leaves out rows that are the same as an earlier one. Raises
    UserError if inputs cannot be read, if no document is left, and if think is "on" and no row has a thinking.
    """
    tokenizer = encoder(settings).tokenizer  # a wrong setting stops here, before any worker starts
    size = sum(Path(path).stat().st_size for path in inputs if Path(path).is_file())
    if 0 < size < INLINE_BYTES:
        workers = 1
    chunks = (chunk for path in inputs for chunk in read_chunks(path, split))
    seen, totals = set[bytes](), Encoded()
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
        for part in encode_all(chunks, settings, workers):
            repeated = set[int]()
            for number, digest in enumerate(part.digests):
                if digest in seen:
                    repeated.add(number)
                elif drop or len(seen) < MOST_COMPARED:
                    seen.add(digest)
            part.counts["dropped" if drop else "repeated"] += len(repeated)
            writer.write(part, repeated if drop else ())
            totals.add_counts(part)
            bar.set_postfix_str(counted(writer.documents, "document"), refresh=False)
            bar.update(min(part.counts["characters"], size - bar.n) if size else part.counts["characters"])
        bar.update(size - bar.n if size else 0)
        refuse_useless(totals, writer.documents, ", ".join(map(str, inputs)), settings, split)
    return totals


def refuse_useless(totals: Encoded, documents: int, inputs: str, settings: EncodeSettings, split: str) -> None:
    """Raise UserError for bad rows that are not to be skipped, and for documents from which nothing is learned."""
    if totals.bad and not settings.skip_bad_rows:
        raise UserError(*totals.bad.lines(), f"({SKIP})")
    if not documents:
        why = "; ".join(left_out(totals)) or "there is no row" + (f" within {split}" if split else "")
        raise UserError(f"{inputs}: no document to write: {why}")
    if not totals.counts["counted"] and settings.command != "prompts":
        why = "; ".join(line.removeprefix("note: ") for line in laid_out(totals) + left_out(totals))
        raise UserError(f"{inputs}: no token counts in the loss, so that there is nothing to learn: {why}")
    if settings.think == "on" and not totals.counts["thinking"]:
        raise UserError(
            f"{inputs}: no row holds thinking, neither <think> … </think> before an answer's words nor a field "
            f"{' or '.join(THINKING)}; name the field so, or give --think off for answers without thinking"
        )


def encode_all(chunks: Iterable[Chunk], settings: EncodeSettings, workers: int = 1) -> Iterator[Encoded]:
    """Yield the Encoded of every chunk, in order, from this process or several others; at most two chunks a worker are
    in memory. Raises UserError if a worker is killed, as by the system when memory runs out, or cannot begin."""
    if workers <= 1:
        for chunk in chunks:
            yield encode_chunk(chunk, settings)
        return
    with elsewhere():  # the process of multiprocessing that keeps track of the others begins
        pool = ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            with blocked_ctrl_c(), elsewhere():  # a new process inherits both
                waiting.append(pool.submit(encode_chunk, chunk, settings))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was ended from outside, or could not begin, which happens if memory runs out; give "
            f"fewer than --workers {workers}"
        ) from error
    finally:
        with blocked_ctrl_c():  # the workers are done after a chunk
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def blocked_ctrl_c() -> Iterator[None]:
    """Put Ctrl-C off until the block ends; processes that begin in it get none, because their parent does."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_with_parent() -> None:
    """End this worker when its parent is gone, however that ended."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
