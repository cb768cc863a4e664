"""What the page proposes to begin with: the bases and the files of rows below a folder, by their names and headers."""

import codecs
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...checkpoints.pth_header import read_header
from ...cli.names import METRICS, RUN, generation
from ...data.containers import SHEETS, kind_of, packing_of
from ...data.rows import IN_FOLDERS
from ..plan.command import dimensions_of
from .files import Places, is_plain, objects, read, walk

MOST = 30  # of each kind
KINDS = (*IN_FOLDERS, ".json", ".txt")  # of files that are mostly rows, unlike pages and archives, which may be chosen
BEGINNING = 1 << 16  # bytes of a file of rows that are looked at
BYTES = 257  # tokens of the byte vocabulary


def proposals(places: Places) -> dict[str, list[dict[str, Any]]]:
    """{"bases": the models, the nearest first; "rows": the files of rows, the newest first}, each with name and bytes.
    A model also has its generation, dimensions and tokenizer; rows are `sound` if their beginning can be read. A run's
    own records are no rows."""
    bases, rows = list[dict[str, Any]](), list[dict[str, Any]]()
    for folder, entries in walk(places.root):
        is_run = RUN in entries and METRICS in entries
        for name in sorted(entries):
            path = folder / name
            if not is_plain(path):
                continue
            status = path.stat()
            named = {"name": places.name(path), "bytes": status.st_size}
            if name.endswith(".pth") and len(bases) < MOST:
                bases += [named | found for found in model_of(path, status.st_size, status.st_mtime_ns)]
            elif not is_run and holds_rows(path) and len(rows) < MOST:
                rows.append(named | {"sound": is_sound(path), "modified": status.st_mtime})
    return {"bases": bases, "rows": sorted(rows, key=lambda one: -one["modified"])}


@lru_cache(maxsize=1024)
def model_of(path: Path, size: int, changed: int) -> tuple[dict[str, Any], ...]:
    """(generation, dimensions and tokenizer of a .pth,), or () if it holds no whole model; size and changed make the
    file's answer its own."""
    header = read_header(path) or {}
    model = dimensions_of(header)
    if model is None:
        return ()
    found = {"generation": generation(model.version), "layers": model.n_layer, "channels": model.n_embd}
    sizes = (math.prod(each.shape) for each in header.values())
    return (found | {"parameters": sum(sizes), "tokenizer": "bytes" if model.vocab_size == BYTES else "world"},)


def holds_rows(path: Path) -> bool:
    """True for a file that is named as rows are; a .json is one if it begins a list, as settings do not."""
    return kind_of(path) in KINDS and (path.suffix != ".json" or read(path, 100).lstrip()[:1] == b"[")


def is_sound(path: Path) -> bool:
    """True if the beginning of a file of rows is what its name says: an object, a list, a table or a text."""
    begin = read(path, BEGINNING)
    if path.suffix in (".parquet", *SHEETS):
        return begin[:4] in (b"PAR1", b"PK\3\4")
    if path.suffix == ".jsonl":
        line, end, _ = begin.lstrip().partition(b"\n")
        return isinstance(next(objects([line]), None), dict) or (
            not end and len(begin) == BEGINNING and line[:1] == b"{"
        )
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(begin)
    except UnicodeDecodeError:
        return packing_of(path) != ""
    lines = text.strip().splitlines()
    return len(lines) > (1 if path.suffix in (".csv", ".tsv") else 0)
