"""The settings that all runs of a comparison share, recorded in its folder so that its table holds only such runs."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ...checkpoints.atomic import write_text
from ...checkpoints.readable import read_settings, require_readable
from ...cli.errors import UserError
from ...data.prefix import ENDINGS, prefixes_of
from ...training.flags.request import parse_flags
from .flags import Comparison
from .runs import any_begun
from .sizes import Size

RECORD = "compare.json"
BLOCK, BLOCKS = 1 << 16, 64  # bytes of a sample of a file, and about how many samples


def check_record(folder: Path, comparison: Comparison, sizes: Mapping[str, Size], fingerprint: str) -> None:
    """Write the settings that all runs of the folder share; once a run has saved anything, compare with those written
    instead. Raises UserError if they differ."""
    path = folder / RECORD
    now = {
        "train": list(comparison.train),
        "steps": comparison.steps,
        "val_every": comparison.val_every,
        "lr_final": comparison.lr_final,
        "parameters": sizes[comparison.methods[0]].parameters,
        "base": fingerprint,
        "data": data_of(comparison),
    }
    if not path.exists() or not any_begun(folder):
        write_text(path, json.dumps(now, indent=2) + "\n")
        return
    found = read_settings(require_readable(path, f"{path}: no such file", again=True))
    before = {"data": now["data"]} | found  # earlier versions did not record it
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"--output {folder} holds a comparison of other settings ({name}: {before.get(name)}, and now "
                f"{value}); give another folder, or the same settings"
            )


def data_of(comparison: Comparison) -> str:
    """A hash of samples of the files that the runs train and validate on, as they are on the disk now."""
    flags = parse_flags([*comparison.train, "--proj_dir", comparison.output])
    digest = hashlib.sha256()
    data, train = flags.data, flags.train
    for path in filter(None, (data.path, *data.more, train.val_data, *train.more_val, train.retain_data)):
        within = sorted(Path(path).rglob("*")) if os.path.isdir(path) else ()
        for file in (Path(path), *(Path(prefix + end) for prefix in prefixes_of(path) for end in ENDINGS), *within):
            if file.is_file():
                digest.update(file.name.encode() + sample_of(file))
    return digest.hexdigest()[:16]


def sample_of(file: Path) -> bytes:
    """A file's size and samples of its content; all of it if it is small."""
    size = file.stat().st_size
    found = [str(size).encode()]
    with open(file, "rb") as content:
        for start in range(0, size, max(BLOCK, size // BLOCKS)):
            content.seek(start)
            found.append(content.read(BLOCK))
    return b"".join(found)
