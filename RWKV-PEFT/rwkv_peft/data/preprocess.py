"""Turns text files into token files.

    rwkv-peft preprocess INPUT... --output PREFIX [--tokenizer world|bytes|FILE]

INPUT is .jsonl (a row a line; forms.py lists them), .json, .csv and .xlsx (the first line names the fields), .txt, .md
or .docx (one document a file), .parquet, an archive or a folder of such files, or one that datasets.save_to_disk wrote
(rows.KINDS). Writes PREFIX.bin and PREFIX.idx, PREFIX.mask if parts of the rows do not count in the
loss, PREFIX.weights if rows have weights, and PREFIX.json, which names the tokenizer.

    rwkv-peft preprocess --ids "Assistant:"    prints the token ids of a text
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from ..checkpoints.atomic import check_output
from ..cli.errors import UserError, bar_seconds
from .binidx import BinidxDataset
from .chat import THINKING
from .encoding import EncodeSettings, Totals, encoder
from .layouts import read_template
from .preprocess_flags import parse_flags
from .recorded import ENDINGS, binidx_prefix, check_record, record_of
from .report import describe, laid_out, left_out, show_documents
from .rows import read_rows
from .texts import Reading
from .token_file_writer import TokenFileWriter
from .tokenizer import load_tokenizer

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
        tool_form=options.tool_form,
        speaker=vars(options)["as"],  # a word of Python
        turns_in_text=options.turns_in_text,
        encoding=options.encoding,
        document_end=options.document_end,
    )
    output, encode = binidx_prefix(options.output), encoder(settings)
    for end in ENDINGS:
        check_output("--output", output + end, [("an input", path) for path in options.input])
    record = record_of(encode.tokenizer, options.input, encode.layout)
    check_record(output, options.input, record, options.overwrite)
    totals = write(options.input, output, settings, options.split, sys.stderr, options.drop_duplicates, record=record)
    written = BinidxDataset(output)
    print(describe(written, totals))
    if options.show:
        print(show_documents(written, options.show, encode.tokenizer))
    return 0


def write(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: EncodeSettings,
    split: str = "",
    progress: TextIO | None = None,
    drop: bool = False,
    sample: bool = False,
    record: str | None = None,
) -> Totals:
    """Encode the inputs into the PREFIX `output`, with its `record` -> the Totals of all rows.

    progress is a stream for a progress bar, or None; drop leaves out rows that are the same as an earlier one; of a
    sample only the beginning is read. Raises UserError if inputs cannot be read, if no document is left, and if think
    is "on" and no row has a thinking.
    """
    encode, seen, totals = encoder(settings), set[bytes](), Totals()
    how = Reading(settings.encoding, settings.document_end, sample, totals.notes)
    size = sum(Path(path).stat().st_size for path in inputs if Path(path).is_file())
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
    with bar, TokenFileWriter(output, encode.tokenizer.vocab_size, record) as writer:
        files = (encode.columns(path, read_rows(path, split, how), totals.counts) for path in inputs)
        for columns, place, item in ((columns, *item) for columns, items in files for item in items):
            part = encode.encode(place, item, totals, columns)
            characters = totals.counts["characters"]
            bar.update((min(characters, size) if size else characters) - bar.n)
            if part is None:
                continue
            if part.digest in seen:
                totals.counts["dropped" if drop else "repeated"] += 1
                if drop:
                    continue
            elif part.digest and (drop or len(seen) < MOST_COMPARED):
                seen.add(part.digest)
            writer.write(part)
        bar.update(size - bar.n if size else 0)
        refuse_useless(totals, writer.documents, ", ".join(map(str, inputs)), settings, split)
    return totals


def refuse_useless(totals: Totals, documents: int, inputs: str, settings: EncodeSettings, split: str) -> None:
    """Raise UserError for bad rows that are not to be skipped, and for documents from which nothing is learned."""
    if totals.bad and not settings.skip_bad_rows:
        skip = [f"({SKIP})"] * bool(documents)  # which leaves nothing if no row can be read
        raise UserError(*totals.bad.lines(), *skip, offers=totals.bad.offers)
    if not documents:
        why = "; ".join(left_out(totals)) or "there is no row" + (f" within {split}" if split else "")
        raise UserError(f"{inputs}: no document to write: {why}", offers=totals.bad.offers)
    if not totals.counts["counted"] and settings.command != "prompts":
        why = "; ".join(line.removeprefix("note: ") for line in laid_out(totals) + left_out(totals))
        raise UserError(f"{inputs}: no token counts in the loss, so that there is nothing to learn: {why}")
    if settings.think == "on" and not totals.counts["thinking"]:
        raise UserError(
            f"{inputs}: no row holds thinking, neither <think> … </think> before an answer's words nor a field "
            f"{' or '.join(THINKING)}; name the field so, or give --think off (train.py: --sft_think off) for answers "
            "without thinking"
        )
