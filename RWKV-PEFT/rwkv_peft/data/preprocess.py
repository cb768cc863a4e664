"""Text files to token files.

    rwkv-peft preprocess INPUT... --output PREFIX [--tokenizer world|bytes|FILE] [--workers N]

INPUT is .jsonl (a row a line; templates.py lists the forms that are recognised), .json, .csv (the first line names the
fields), .txt (one document a file), .parquet, a folder of .jsonl, .csv or .parquet files, or one that
datasets.save_to_disk wrote. Writes PREFIX.bin and PREFIX.idx, PREFIX.mask where parts of the rows do not count in the
loss, and PREFIX.json, which names the tokenizer.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from tqdm import tqdm

from ..cli import Parser, count, counted, positive, whole
from ..errors import UserError
from ..files.atomic import check_output, temporary_beside
from ..streams import bar_seconds
from .binidx import BinidxDataset, BinidxWriter, binidx_prefix
from .encoding import Encoded, EncodeSettings, encoder
from .order import Permutation
from .recorded import check_record, record_of, require_own
from .report import describe, left_out
from .rows import KINDS, read_chunks
from .show import marks_for, show_documents
from .templates import TEMPLATES, read_template
from .thinking import FIELDS, OPENINGS
from .workers import encode_all

INLINE_BYTES = 4 << 20
SKIP = "--skip_bad_rows leaves such rows out, and counts them"
# flags of the tools that others make token files with -> what is given here
SYNONYMS = MappingProxyType(
    {
        "--input": "the file's name, without a flag",
        "--output_prefix": "--output",
        "--tokenizer_type": "--tokenizer world, which is the default",
        "--vocab_file": "--tokenizer FILE, and needs none for World",
        "--jsonl_keys": "--fields",
    }
)


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
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
    for end in (".bin", ".idx", ".mask"):
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
        print(show_documents(written, options.show, encoder(settings).tokenizer, marks_for(sys.stdout)))
    return 0


def parser() -> Parser:
    result = Parser(
        prog="rwkv-peft preprocess", synonyms=SYNONYMS, description="Text files to token files (.bin and .idx)."
    )
    result.add_argument("input", nargs="+", help=KINDS)
    result.add_argument("--output", required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx")
    result.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a data set of that name (default: only one that was made of the same inputs)",
    )
    result.add_argument(
        "--tokenizer", default="world", metavar="NAME|FILE", help="world, bytes, or a vocabulary file (default: world)"
    )
    result.add_argument(
        "--append_eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end token (default: do)",
    )
    result.add_argument(
        "--fields",
        nargs="+",
        default=[],
        metavar="NAME",
        help="the field that holds the text, or those that hold a prompt and its answer",
    )
    result.add_argument(
        "--template",
        default="",
        metavar="NAME|FILE",
        help=f"{', '.join(TEMPLATES)}, or a text with {{field}} for fields and [[ ]] around what counts in the loss",
    )
    result.add_argument(
        "--think",
        default="",
        choices=tuple(OPENINGS),
        help="chats of RWKV-7 G1: on opens answers with <think where a row holds thinking, else with <think></think; "
        "off with that everywhere, and leaves out what rows hold (default: answers as rows have them)",
    )
    result.add_argument(
        "--split", default="", metavar="TRAIN[A:B]", help="rows to read, such as train[:1000] or [10%%:]"
    )
    result.add_argument(
        "--skip_bad_rows", action="store_true", help="leave out rows that cannot be read, and count them by kind"
    )
    result.add_argument(
        "--show",
        type=count,
        default=0,
        metavar="N",
        help="print the first N documents too, long texts without their middle: what counts in the loss marked, <end> "
        "for the end token",
    )
    result.add_argument("--shuffle", type=whole, metavar="SEED", help="write the documents in the order of this seed")
    result.add_argument(
        "--repeat",
        type=positive,
        default=1,
        metavar="N",
        help="write the documents N times, shuffled anew (default: 1)",
    )
    result.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)"
    )
    return result


def write(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: EncodeSettings,
    workers: int = 1,
    split: str = "",
    progress: TextIO | None = None,
    record: str | None = None,
) -> Encoded:
    """Encode the inputs into PREFIX `output`; returns an Encoded that holds the counts of all chunks.

    progress is a stream for a progress bar, or None; record as in BinidxWriter. Raises UserError for inputs that cannot
    be read, where no document is left, and where thinking is asked for and none has any.
    """
    tokenizer = encoder(settings).tokenizer  # a wrong setting stops here, before any worker starts
    size = sum(Path(path).stat().st_size for path in inputs if Path(path).is_file())
    if 0 < size < INLINE_BYTES:
        workers = 1
    chunks = (chunk for path in inputs for chunk in read_chunks(path, split, tokenizer.cuts_at_lines))
    totals = Encoded()
    # A character stands for a byte of the input: near enough for a bar.
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
            writer.add_documents(part.tokens, part.sizes, part.mask, part.continues)
            totals.add_counts(part)
            bar.set_postfix_str(counted(len(writer.sizes), "document"), refresh=False)
            bar.update(min(part.characters, size - bar.n) if size else part.characters)
        bar.update(size - bar.n if size else 0)
        if totals.bad and not settings.skip_bad_rows:
            raise UserError("\n".join([*totals.bad.lines(), f"({SKIP})"]))
        if not writer.sizes:
            why = "; ".join(left_out(totals)) or "there is no row" + (f" within {split}" if split else "")
            raise UserError(f"{', '.join(map(str, inputs))}: no document to write: {why}")
        if settings.think == "on" and not totals.thinking:
            raise UserError(
                f"{', '.join(map(str, inputs))}: no row holds thinking, neither <think> … </think> before an answer's "
                f"words nor a field {' or '.join(FIELDS)}; name the field so, or take off for answers at once"
            )
    return totals


def rewrite(
    source: BinidxDataset, output: str | Path, seed: int | None, repeat: int, record: str | None = None
) -> None:
    """Write a BinidxDataset's documents `repeat` times, each time in another order where a seed is given; record as in
    BinidxWriter."""
    vocab_size = 65536 if source.dtype.itemsize == 2 else 1 << 31
    with BinidxWriter(output, vocab_size, mask=source.mask is not None, record=record) as writer:
        for turn in range(repeat):
            for index in range(len(source)) if seed is None else Permutation(len(source), seed, turn):
                start, size = source.start(index), int(source.sizes[index])
                mask = None if source.mask is None else source.mask[start : start + size].tobytes()
                writer.add_documents(source[index].tobytes(), [size], mask)
