"""The runs below a folder, whoever started them: what they are, and what they wrote so far."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files.lock import LOCK, holder
from ..names import METRICS, RUN
from .places import Places

DEEP = 5  # levels of folders that are looked through
MOST = 200  # runs that are shown
BYTES = 4 << 20  # of a file, that are read at a time
TAIL = 1 << 18  # bytes at the end of a file of answers
ANSWERS = ("rows.jsonl", "answers.jsonl")
PRODUCTS = (".safetensors", ".pth", ".png", ".gguf")
SKIPPED = ("checkpoints", "tensorboard", "wandb", "swanlab", "node_modules")


def find_runs(places: Places) -> list[dict[str, Any]]:
    """The runs below the root, the newest first: folder, running, when it wrote last, settings that tell it apart."""
    found = sorted(folders(places.root), key=lambda folder: -modified(folder))[:MOST]
    return [described(places, folder) for folder in found]


def folders(root: Path) -> Iterator[Path]:
    """Yield the folders of runs below `root`; links are not followed."""
    for place, below, files in os.walk(root):
        if RUN in files and METRICS in files:
            yield Path(place)
        deep = len(Path(place).relative_to(root).parts) >= DEEP
        below[:] = [] if deep else [name for name in below if not name.startswith(".") and name not in SKIPPED]


def modified(folder: Path) -> float:
    try:
        return (folder / METRICS).stat().st_mtime
    except FileNotFoundError:  # it was moved away this moment
        return 0.0


def described(places: Places, folder: Path) -> dict[str, Any]:
    """A run in a few words. Settings that cannot be read are missing."""
    try:
        settings = json.loads((folder / RUN).read_text("utf-8"))
    except (OSError, ValueError):
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    return {
        "folder": places.name(folder),
        "running": holder(folder / LOCK) is not None,
        "modified": modified(folder),
        "steps": settings.get("steps"),
        "flags": settings.get("flags", {}),
        "files": sorted(entry.name for entry in folder.iterdir() if entry.suffix in PRODUCTS),
    }


def lines_of(path: Path, begin: int = 0) -> dict[str, Any]:
    """The objects in whole lines of a .jsonl file from byte `begin` on, and `next`, the byte to go on from. A file that
    became shorter, because a run began anew, is read from its start: `again` is then True."""
    try:
        with open(path, "rb") as file:
            again = begin > file.seek(0, os.SEEK_END)
            file.seek(0 if again else begin)
            data = file.read(BYTES)
    except FileNotFoundError:
        return {"lines": [], "next": 0, "again": begin > 0}
    whole = data[: data.rfind(b"\n") + 1]
    return {"lines": list(objects(whole)), "next": (0 if again else begin) + len(whole), "again": again}


def last_of(path: Path) -> list[Any]:
    """The objects in the last lines of a .jsonl file."""
    try:
        found: list[Any] = lines_of(path, max(path.stat().st_size - TAIL, 0))["lines"]
    except FileNotFoundError:
        return []
    return found


def objects(data: bytes) -> Iterator[Any]:
    """Yield the values of lines of JSON; a number that JSON does not have (NaN) becomes None, and other lines are left
    out."""
    for line in data.splitlines():
        try:
            yield json.loads(line, parse_constant=lambda word: None)
        except ValueError:
            continue
