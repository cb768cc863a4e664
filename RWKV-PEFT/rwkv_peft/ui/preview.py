"""Shows how the rows of a file become tokens, before anything trains: prints one JSON object.

python -m rwkv_peft.ui.preview '{"path": …, "tokenizer": …}'
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DATA_TYPES
from ..data.binidx import BinidxDataset
from ..data.encode_settings import EncodeSettings
from ..data.encoding import encoder
from ..data.preprocess import write
from ..data.report import laid_out, left_out
from ..data.show import counted_in, pieces
from ..errors import UserError
from ..files.readable import require_readable

ROWS = 2000  # rows that are read, from the start
SPLIT = f"train[:{ROWS}]"
SHOWN = 3  # documents that are shown as text


def preview(options: Mapping[str, str]) -> dict[str, Any]:
    """Tokenize the first ROWS rows of a file as a run with the same settings does: path, tokenizer, data_type, think.

    -> sizes: tokens of each document; counted: tokens that count in the loss; notes: on rows that may be mistakes or
    were left out; documents: the first as [{"title", "pieces": [[text, counts], …]}]. Raises UserError if the file has
    no row that can be read."""
    data_type = options.get("data_type") or "sft"
    command = "train" if data_type in ("sft", "binidx") else data_type
    if data_type not in DATA_TYPES:
        raise UserError(f"--data_type {data_type}: one of {', '.join(DATA_TYPES)}")
    require_readable(Path(options["path"]), f"{options['path']}: no such file")
    settings = EncodeSettings(
        options.get("tokenizer") or "world",
        think=options.get("think") or "",
        skip_bad_rows=True,
        command=command,
        end_token=command != "prompts",
    )
    with tempfile.TemporaryDirectory() as folder:
        totals = write([options["path"]], f"{folder}/data", settings, split=SPLIT)
        data = BinidxDataset(f"{folder}/data")
        tokenizer, documents = encoder(settings).tokenizer, []
        for index in range(min(SHOWN, len(data))):
            tokens, counted = data[index], counted_in(data, index)
            title = f"{len(tokens):,} tokens, {int(counted.sum()):,} count"
            documents.append({"title": title, "pieces": pieces(tokens, counted, tokenizer)})
        return {
            "rows": ROWS,
            "sizes": np.asarray(data.sizes).tolist(),
            "counted": int(np.count_nonzero(data.mask)) if data.mask is not None else int(sum(data.sizes)),
            "notes": laid_out(totals) + left_out(totals),
            "bad": totals.bad.counts.total(),
            "documents": documents,
        }


def main(argv: list[str]) -> int:
    try:
        print(json.dumps(preview(json.loads(argv[0]))))
    except UserError as error:
        print(json.dumps({"error": str(error).replace(f" within {SPLIT}", "")}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
