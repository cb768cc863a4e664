"""Shows how the rows of a file become tokens, before anything trains: prints one JSON object.

python -m rwkv_peft.tools.ui.preview '{"path": …, "tokenizer": …}'
"""

import codecs
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from ...cli.errors import UserError
from ...config import DATA_TYPES, OF_ROWS
from ...data.binidx import BinidxDataset
from ...data.chat import KNOWN, TURN_END
from ...data.encoding import EncodeSettings, encoder
from ...data.preprocess import write
from ...data.report import counted_in, fitting, laid_out, left_out, pieces
from ...data.rows import TRAIN, is_saved, row_files

ROWS = 2000  # rows that are read, from the start
SPLIT = f"[:{ROWS}]"
BYTES = 4 << 20  # of a text that are read
SHOWN = 3  # documents that are shown as text
NAMES = "|".join(name for openings, last in KNOWN for name in (*openings, last))
SPEAKER = re.compile(rf"(?:\A|{TURN_END})({NAMES})")


def preview(options: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenize the first ROWS rows of a file or folder as a run with the same settings does: path, tokenizer,
    data_type, fields.

    -> sizes: tokens of each document; counted: tokens that count in the loss; notes: on rows that may be mistakes or
    were left out; texts: True if a run cuts long texts into several rows; ctx_len: tokens that most rows fit in;
    documents: the first as [{"tokens", "learned", "turns"}]. Raises UserError if no row can be read."""
    path, data_type = options["path"], options.get("data_type") or "sft"
    if data_type not in OF_ROWS:
        raise UserError(f"--data_type {data_type}: one of {', '.join(OF_ROWS)}")
    fields = tuple(options.get("fields") or ())
    DATA_TYPES[data_type].check_fields(fields)
    settings = EncodeSettings(
        options.get("tokenizer") or "world",
        fields=fields,
        skip_bad_rows=True,
        command="train" if data_type == "sft" else data_type,
        end_token=data_type != "prompts",
    )
    with tempfile.TemporaryDirectory() as folder:
        is_text = path.endswith(".txt")
        begin = beginning(Path(path), Path(folder)) if is_text else Path(path)
        totals = write([begin], f"{folder}/data", settings, split="" if is_text else SPLIT)
        data = BinidxDataset(f"{folder}/data")
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
            "notes": [f"These are the first {BYTES:,} bytes of the text."] * (begin != Path(path))
            + laid_out(totals)
            + left_out(totals),
            "bad": totals.bad.counts.total(),
            "texts": is_text or is_folder_of_texts(Path(path)),
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


def is_folder_of_texts(path: Path) -> bool:
    files = row_files(path) if path.is_dir() and not is_saved(path) else {}
    return any(file.suffix == ".txt" for file in files.get(TRAIN, []))


def beginning(path: Path, folder: Path) -> Path:
    """A copy of a text's first BYTES in `folder`, or the text itself if it is no longer, or not UTF-8."""
    with open(path, "rb") as file:
        data, more = file.read(BYTES), file.read(1)
    if not more:
        return path
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data)
    except UnicodeDecodeError:
        return path
    copy = folder / "text.txt"
    copy.write_text(text, "utf-8", newline="")
    return copy


def main(argv: list[str]) -> int:
    try:
        print(json.dumps(preview(json.loads(argv[0]))))
    except UserError as error:
        print(json.dumps({"error": str(error).replace(f" within {SPLIT}", "")}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
