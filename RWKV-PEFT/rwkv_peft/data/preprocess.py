"""Turns text files into token files.

    rwkv-peft preprocess INPUT... --output PREFIX [--tokenizer world|bytes|FILE] [--workers N]

INPUT is .jsonl (a row a line; templates.py lists the forms that are recognised), .json, .csv (the first line names the
fields), .txt (one document a file), .parquet, a folder of .jsonl, .csv or .parquet files, or one that
datasets.save_to_disk wrote. Writes PREFIX.bin and PREFIX.idx, PREFIX.mask if parts of the rows do not count in the
loss, PREFIX.weights if rows have weights, and PREFIX.json, which names the tokenizer.

    rwkv-peft preprocess --ids "Assistant:"    prints the token ids of a text
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from ..cli import counted
from ..errors import UserError
from ..files.atomic import check_output, temporary_beside
from ..streams import bar_seconds
from .binidx import BinidxDataset
from .binidx_writer import BinidxWriter
from .encode_settings import EncodeSettings
from .encoding import Encoded, encoder
from .order import Permutation
from .prefix import ENDINGS, binidx_prefix
from .preprocess_flags import parse_flags
from .recorded import check_record, record_of, require_own
from .report import describe, left_out
from .rows import read_chunks
from .templates import read_template
from .thinking import FIELDS
from .tokenizer import load_tokenizer
from .workers import encode_all

INLINE_BYTES = 4 << 20
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
        options.skip_bad_rows,
    )
    output = binidx_prefix(options.output)
    check_record(output, options.input)
    for end in ENDINGS:
        check_output("--output", output + end, [("an input", path) for path in options.input])
    record = record_of(encoder(settings).tokenizer, options.input)
    if not options.overwrite:
        require_own(output, record)

    def encode(prefix: str | Path, record: str | None = None) -> Encoded:
        return write(options.input, prefix, settings, options.workers, options.split, sys.stderr, record)

    if options.shuffle is None and options.repeat == 1:
        totals = encode(output, record)
    else:
        with temporary_beside(Path(output), folder=True) as folder:
            totals = encode(folder / "data")
            rewrite(BinidxDataset(folder / "data"), output, options.shuffle, options.repeat, record)
    written = BinidxDataset(output)
    print(describe(written, totals))
    if options.show:
        from .show import marks_for, show_documents  # by torch, which nothing else here needs

        print(show_documents(written, options.show, encoder(settings).tokenizer, marks_for(sys.stdout)))
    return 0


def write(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: EncodeSettings,
    workers: int = 1,
    split: str = "",
    progress: TextIO | None = None,
    record: str | None = None,
) -> Encoded:
    """Encode the inputs into PREFIX `output`; return an Encoded with the counts of all chunks.

    progress is a stream for a progress bar, or None; record is as in BinidxWriter. Raises UserError if inputs cannot be
    read, if no document is left, and if thinking is asked for and no row has any.
    """
    tokenizer = encoder(settings).tokenizer  # a wrong setting stops here, before any worker starts
    size = sum(Path(path).stat().st_size for path in inputs if Path(path).is_file())
    if 0 < size < INLINE_BYTES:
        workers = 1
    chunks = (chunk for path in inputs for chunk in read_chunks(path, split, tokenizer.cuts_at_lines))
    totals = Encoded()
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
    with bar, BinidxWriter(output, tokenizer.vocab_size, mask=True, record=record) as writer:
        for part in encode_all(chunks, settings, workers, lambda: bool(totals.bad) and not settings.skip_bad_rows):
            writer.add_documents(part.tokens, part.sizes, part.mask, part.continues, part.weights)
            totals.add_counts(part)
            bar.set_postfix_str(counted(len(writer.sizes), "document"), refresh=False)
            bar.update(min(part.counts["characters"], size - bar.n) if size else part.counts["characters"])
        bar.update(size - bar.n if size else 0)
        if totals.bad and not settings.skip_bad_rows:
            raise UserError("\n".join([*totals.bad.lines(), f"({SKIP})"]))
        if not writer.sizes:
            why = "; ".join(left_out(totals)) or "there is no row" + (f" within {split}" if split else "")
            raise UserError(f"{', '.join(map(str, inputs))}: no document to write: {why}")
        if settings.think == "on" and not totals.counts["thinking"]:
            raise UserError(
                f"{', '.join(map(str, inputs))}: no row holds thinking, neither <think> … </think> before an answer's "
                f"words nor a field {' or '.join(FIELDS)}; name the field so, or give --think off for answers without "
                "thinking"
            )
    return totals


def rewrite(
    source: BinidxDataset, output: str | Path, seed: int | None, repeat: int, record: str | None = None
) -> None:
    """Write a BinidxDataset's documents `repeat` times, each time in another order if a seed is given; record is as in
    BinidxWriter."""
    vocab_size = 65536 if source.dtype.itemsize == 2 else 1 << 31
    with BinidxWriter(output, vocab_size, mask=source.mask is not None, record=record) as writer:
        for turn in range(repeat):
            for index in range(len(source)) if seed is None else Permutation(len(source), seed, turn):
                start, size = source.start(index), int(source.sizes[index])
                mask = None if source.mask is None else source.mask[start : start + size].tobytes()
                weights = () if source.weights is None else (float(source.weights[index]),)
                writer.add_documents(source[index].tobytes(), [size], mask, weights=weights)
