"""Shows how the rows of a file become tokens, before anything trains: prints one JSON object.

python -m rwkv_peft.tools.ui.preview '{"path": …, "tokenizer": …}'
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from ...cli.errors import UserError
from ...config import OF_ROWS, DataConfig
from ...data.binidx import BinidxDataset
from ...data.chat import KNOWN, TURN_END
from ...data.encoding import EncodeSettings, Totals, encoder
from ...data.overview import overview
from ...data.preprocess import write
from ...data.report import counted_in, fitting, laid_out, left_out, offers, pieces
from ...data.row_settings import settings_of
from ...data.texts import ROWS

FLAGS = (
    "data_type",
    "tokenizer",
    "sft_field",
    "sft_as",
    "sft_think",
    "tool_form",
    "turns_in_text",
    "encoding",
    "document_end",
)  # that may be given
SHOWN = 3  # documents that are shown as text
NAMES = "|".join(name for openings, last in KNOWN for name in (*openings, last))
SPEAKER = re.compile(rf"(?:\A|{TURN_END})({NAMES})")


def preview(options: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenize the beginning of a file or folder as a run with the same settings does: path, and flags of FLAGS.

    -> fields, taken, names: its Overview; offers: flags and values that would change how it is read; and, unless no row
    can be read, which is the `error`: sizes: tokens of each document; counted: tokens that count in the loss; notes: on
    rows that may be mistakes or were left out; texts: True if a run cuts long texts into several rows; ctx_len: tokens
    that most rows fit in; documents: the first as [{"tokens", "learned", "turns"}]."""
    path, given = options["path"], {name: options[name] for name in FLAGS if options.get(name)}
    try:
        if (data_type := given.pop("data_type", "sft")) not in OF_ROWS:
            raise UserError(f"--data_type {data_type}: one of {', '.join(OF_ROWS)}")
        given["sft_field"] = tuple(given.get("sft_field", ()))
        config = DataConfig(path, data_type=data_type, **given)
        settings = replace(settings_of(config), skip_bad_rows=True, max_tokens=0)
    except UserError as error:
        return {"error": str(error)}
    about = asdict(overview(Path(path), settings))
    try:
        with tempfile.TemporaryDirectory() as folder:
            totals = write([path], f"{folder}/data", settings, sample=True)
            return about | {"offers": offers(totals)} | shown(BinidxDataset(f"{folder}/data"), totals, settings)
    except UserError as error:
        return about | {"offers": error.offers, "error": str(error)}


def shown(data: BinidxDataset, totals: Totals, settings: EncodeSettings) -> dict[str, Any]:
    tokenizer, documents = encoder(settings).tokenizer, []
    for index in range(min(SHOWN, len(data))):
        tokens, counted = data[index], counted_in(data, index)
        turns = turns_of(pieces(tokens, counted, tokenizer))
        documents.append({"tokens": len(tokens), "learned": int(counted.sum()), "turns": turns})
    return {
        "rows": ROWS,
        "sizes": np.asarray(data.sizes).tolist(),
        "ctx_len": fitting(np.asarray(data.sizes)),
        "counted": int(np.count_nonzero(data.mask)) if data.mask is not None else int(sum(data.sizes)),
        "notes": laid_out(totals) + left_out(totals),
        "bad": totals.bad.counts.total(),
        "texts": totals.counts["texts"] > 0,
        "documents": documents,
    }


def turns_of(found: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Pieces (text, counts) as the turns of a chat, each with its speaker, True if the speaker's name counts, and the
    pieces behind it. A text without speakers is a turn for each piece, with "" as its speaker."""
    letters = [(letter, counts) for text, counts in found for letter in text]
    text = "".join(letter for letter, _ in letters)
    heads = list(SPEAKER.finditer(text)) if SPEAKER.match(text) else []
    if not heads:
        return [{"speaker": "", "learned": counts, "pieces": [(text, counts)]} for text, counts in found]
    turns = list[dict[str, Any]]()
    for head, end in zip(heads, [*(head.start() for head in heads[1:]), len(text)]):
        said = joined(letters[head.end() : end])
        turns.append({"speaker": head[1].rstrip(":"), "learned": letters[head.start(1)][1], "pieces": said})
    return turns


def joined(letters: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    return [("".join(map(itemgetter(0), run)), counts) for counts, run in groupby(letters, key=itemgetter(1))]


def main(argv: list[str]) -> int:
    print(json.dumps(preview(json.loads(argv[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
