"""The files of rows in a folder, and their splits by the files' names."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType

from ..checkpoints.readable import object_in
from ..cli.errors import UserError

ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".csv", ".tsv", ".parquet")  # not .json, which settings have, too
TRAIN = "train"
WORDS = MappingProxyType(  # a word in the name of a file -> its split
    {
        "train": TRAIN,
        "training": TRAIN,
        "validation": "validation",
        "valid": "validation",
        "val": "validation",
        "dev": "validation",
        "test": "test",
        "testing": "test",
    }
)
HELD_OUT = ("validation", "valid", "val", "dev", "test")  # splits to validate on, the first that exists
SAVED, SPLITS = "state.json", "dataset_dict.json"  # one of them lies in a folder of datasets.save_to_disk


def is_saved(folder: Path) -> bool:
    """True for a folder that datasets.save_to_disk wrote."""
    return (folder / SAVED).exists() or (folder / SPLITS).exists()


def row_files(folder: Path) -> dict[str, list[Path]]:
    """The {split: files of rows} of a folder or, if it has none, of the one folder in it that has some, or else the
    folder's texts; {} if there are none. Files without one of WORDS in their names are of the split train.

    Raises UserError for files of several kinds, for several such folders, and for a link out of the folder."""
    found, place = files_in(folder), folder
    if not found:
        within = [path for path in below(folder) if path.is_dir() and files_in(path)]
        if len(within) > 1:
            raise UserError(f"{folder} holds several folders of rows; give one of {', '.join(map(str, within))}")
        for place in within:
            found = files_in(place)
    kinds = sorted({ending_of(path) for path in found})
    if len(kinds) > 1:
        raise UserError(
            f"{place} holds files of several kinds ({', '.join(kinds)}), which may be the same rows twice; name a "
            "file, or leave one kind in the folder"
        )
    splits: dict[str, list[Path]] = {}
    for path in found:
        words = re.split("[^a-z]+", path.name.lower())
        splits.setdefault(next((WORDS[word] for word in words if word in WORDS), TRAIN), []).append(path)
    if texts := [] if found else [path for path in below(folder) if path.suffix == ".txt" and path.is_file()]:
        splits[TRAIN] = texts
    for path in sum(splits.values(), []):
        require_within(folder, path)
    return splits


def require_within(folder: Path, path: Path) -> Path:
    """The path itself. Raises UserError for a link out of a folder of rows: a downloaded data set could read any file,
    such as a key, into the tokens."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"{path} leads out of {folder} by a link, to {os.path.realpath(path)}, and only files within a folder are "
            "read as its rows; name that file itself, or put a copy in the link's place"
        )
    return path


def choose(splits: Iterable[str], name: str, folder: Path) -> str:
    """The split called name; without a name the only split, or else train."""
    splits = list(splits)
    chosen = name or (splits[0] if len(splits) == 1 else TRAIN)
    if chosen not in splits:
        raise UserError(f"{folder}: no split {chosen!r}; it has {', '.join(splits)}")
    return chosen


def held_out_split(path: str | Path) -> str:
    """The split to validate on, one of HELD_OUT, in a folder of several splits; "" if there is none, and for a file."""
    folder = Path(path)
    if not folder.is_dir():
        return ""
    splits = saved_splits(folder) if is_saved(folder) else list(row_files(folder))
    return next((name for name in HELD_OUT if name in splits and len(splits) > 1), "")


def saved_splits(folder: Path) -> list[str]:
    """The splits that datasets.save_to_disk wrote; [] for one data set, or if the file that names them cannot be read,
    which is an error as soon as rows are read."""
    splits = object_in(folder / SPLITS).get("splits")
    return [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []


def files_in(folder: Path) -> list[Path]:
    """The files of rows directly in a folder, by name."""
    return [path for path in below(folder) if ending_of(path) and path.is_file()]


def below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def ending_of(path: Path) -> str:
    """The ending of a name among ENDINGS, or ""."""
    return next((ending for ending in reversed(ENDINGS) if path.name.endswith(ending)), "")
