"""The runs below a folder, whoever started them: what they are, and what they wrote so far."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...checkpoints.best import is_place, take
from ...checkpoints.lock import LOCK, holder
from ...cli.errors import UserError
from ...cli.names import METRICS, RUN
from .lines import last_of, objects, read
from .places import Places

DEEP = 5  # levels of folders that are looked through
LOOKED = 3000  # folders that are: the page asks every 3 seconds, and a home folder may hold a hundred thousand
LINE = 1 << 12  # bytes of a step's line in METRICS, and more
ANSWERS = ("rows.jsonl", "answers.jsonl")
PRODUCTS = (".safetensors", ".pth", ".png", ".gguf")
SKIPPED = ("checkpoints", "tensorboard", "wandb", "swanlab", "node_modules")


def find_runs(places: Places) -> list[dict[str, Any]]:
    """The runs below the root, the newest first: folder, running, when it wrote last, settings that tell it apart."""
    found = sorted(folders(places.root), key=lambda folder: -modified(folder))
    runs = list[dict[str, Any]]()
    for folder in found:
        with suppress(OSError):  # it was moved away this moment, or may not be read
            runs.append(described(places, folder))
    return runs


def folders(root: Path) -> Iterator[Path]:
    """Yield the folders of runs below `root`, the nearest first; links are not followed."""
    level, looked = [str(root)], 0
    for _ in range(DEEP + 1):
        below = []
        for place in level[: LOOKED - looked]:
            looked += 1
            with suppress(OSError), os.scandir(place) as found:
                entries = {entry.name: entry for entry in found if not entry.name.startswith(".")}
                if RUN in entries and METRICS in entries:
                    yield Path(place)
                inner = (entry for name, entry in entries.items() if name not in SKIPPED)
                below += [entry.path for entry in inner if entry.is_dir(follow_symlinks=False)]
        level = below


def modified(folder: Path) -> float:
    try:
        return (folder / METRICS).stat().st_mtime
    except OSError:  # it was moved away this moment, or is a link to itself
        return 0.0


def described(places: Places, folder: Path) -> dict[str, Any]:
    """A run in a few words. Settings that cannot be read are missing."""
    name = places.name(folder)
    settings: Any = {}
    with suppress(OSError, UserError):
        settings = next(objects([read(places.inside(f"{name}/{RUN}"))]), {})
    settings = settings if isinstance(settings, dict) else {}
    flags, train, steps = (settings.get(key) for key in ("flags", "train", "steps"))
    epochs = train.get("epoch_count") if isinstance(train, dict) else None
    last = (last_of(folder / METRICS, LINE) or [None])[-1]
    done = last.get("step") if isinstance(last, dict) else None
    return {
        "folder": name,
        "running": holder(folder / LOCK) is not None,
        "modified": modified(folder),
        "steps": steps if is_place(steps) else 0,
        "done": done + 1 if is_place(done) else 0,
        "epochs": epochs if is_place(epochs) else 0,
        "flags": flags if isinstance(flags, dict) else {},
        "files": sorted(entry.name for entry in folder.iterdir() if entry.suffix in PRODUCTS),
    }


def taken(places: Places, folder: str) -> dict[str, Any]:
    """The file of a run to take, the newest or the best one, the other one of them if there is one, and why."""
    path, *_ = (places.inside(f"{folder}{name}") for name in ("", f"/{METRICS}", f"/{RUN}"))
    found = take(path)
    return {
        "file": places.name(found.path),
        "other": found.other and places.name(found.other),
        "note": found.note.replace(f"{places.root}/", "").removeprefix("note: "),
    }
