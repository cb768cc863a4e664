"""Text files to token files.

    python -m rwkv_peft.data.preprocess INPUT... --output PREFIX [--tokenizer world|bytes|FILE]

INPUT is .jsonl (a row a line; the forms are listed in templates.py) or .txt (one document a file).
Writes PREFIX.bin and PREFIX.idx, and PREFIX.mask where parts of the rows do not count in the loss.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from ..errors import UserError, exit_on_user_error
from .binidx import BinidxWriter, binidx_prefix
from .order import magic_prime
from .templates import segments
from .tokenizer import load_tokenizer


def main(argv):
    options = parser().parse_args(argv)
    tokenizer = load_tokenizer(options.tokenizer)
    if options.append_eod and tokenizer.end_id is None:
        raise UserError(f"--append_eod: tokenizer {tokenizer.name} names no end-of-document token; "
                        "take --no-append_eod")
    end_id = tokenizer.end_id if options.append_eod else None
    sizes = []
    with BinidxWriter(options.output, tokenizer.vocab_size, mask=True) as writer:
        for where, row in read_rows(options.input):
            try:
                tokens, mask = encode(segments(row), tokenizer, end_id)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            writer.add(tokens, mask)
            sizes.append(len(tokens))
        if not sizes:
            raise UserError(f"{', '.join(options.input)}: no document; nothing is written")
    print(report(options.output, np.array(sizes)))
    return 0


def parser():
    result = argparse.ArgumentParser(prog="python -m rwkv_peft.data.preprocess", allow_abbrev=False,
                                     description="Text files to token files (.bin and .idx).")
    result.add_argument("input", nargs="+", help=".jsonl or .txt files")
    result.add_argument("--output", required=True, help="prefix of the files to write")
    result.add_argument("--tokenizer", default="world", help="world, bytes, or a vocabulary file")
    result.add_argument("--append_eod", action=argparse.BooleanOptionalAction, default=True,
                        help="end each document with the tokenizer's end token")
    return result


def read_rows(paths):
    """Yield (place, row) for every row of the files."""
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if path.suffix == ".txt":
            yield str(path), {"text": read_text(path)}
            continue
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", parse_row(line, f"{path}, line {number}")


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def parse_row(line, where):
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); a .jsonl file holds one JSON object a line") from error


def encode(parts, tokenizer, end_id):
    """[(text, counts)] -> token ids and, for each, 1 where it counts in the loss, else 0."""
    tokens, mask = [], []
    for text, counts in parts:
        ids = tokenizer.encode(text)
        tokens += ids
        mask += [int(counts)] * len(ids)
    if end_id is not None:
        tokens.append(end_id)
        mask.append(int(parts[-1][1]))
    return tokens, mask


def report(output, sizes):
    """What was written, and settings that fit it."""
    total = int(sizes.sum())
    ctx_len = min(4096, max(16, 1 << int(np.percentile(sizes, 95) - 1).bit_length()))
    return (f"{binidx_prefix(output)}: {len(sizes)} documents, {total} tokens; lengths {sizes.min()} to {sizes.max()}, "
            f"mean {sizes.mean():.0f}\nfor --ctx_len {ctx_len}: {-(-(total - 1) // ctx_len)} windows an epoch, "
            f"--magic_prime {magic_prime(total, ctx_len)} (RWKV-LM)")


if __name__ == "__main__":
    exit_on_user_error(main)
