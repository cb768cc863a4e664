"""The runs below a folder, whoever started them: their state and what they do now, their settings, and the time of the
next one, by the pace of an earlier run with the same settings on the same files.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...checkpoints.best import is_place, labelled, take
from ...checkpoints.lock import LOCK, holder
from ...cli.errors import UserError
from ...cli.names import ADAPTER, LEARNED, LEARNED_ROWS, METRICS, RUN
from ...training.flags.parser import entries_of, parser_of_train
from .files import Places, is_plain, last_of, lines_of, objects, read, walk
from .jobs import STOPPED

LINE = 1 << 12  # bytes of a step's line in METRICS, and more
ANSWERS = ("rows.jsonl", "answers.jsonl", LEARNED_ROWS)
PRODUCTS = (".safetensors", ".pth", ".png", ".gguf")


BEGINS, RUNS, DONE, HALTED, FAILED = "begins", "running", "done", "stopped", "failed"
LATER = 1.0  # seconds by which a file that is written after another may be older, by its file system's clock


def find_runs(places: Places, jobs: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The runs below the root, the newest first, as `described`; among them, those that jobs have started and that have
    no folder yet, or none any more."""
    started = dict[str, Mapping[str, Any]]()
    for job in jobs:  # the newest comes first
        if job["words"][0] == "train":
            started.setdefault(folder_of(places, job["words"]), job)
    named = {places.name(folder): folder for folder in folders(places.root)}
    runs = list[dict[str, Any]]()
    for name in {**named, **started}:
        with suppress(OSError, UserError):  # it was moved away this moment, or may not be read
            runs.append(described(places, name, started.get(name)))
    return sorted(runs, key=lambda run: -run["modified"])


def folder_of(places: Places, words: Sequence[str]) -> str:
    """The folder that a command's --proj_dir names, from the root; the name as it stands if it leads elsewhere."""
    named = words[words.index("--proj_dir") + 1] if "--proj_dir" in words[:-1] else "out"
    return os.path.relpath(os.path.join(places.root, named), places.root)


def folders(root: Path) -> Iterator[Path]:
    """Yield the folders of runs below `root`, the nearest first."""
    return (folder for folder, entries in walk(root) if RUN in entries)


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it was moved away this moment, or is a link to itself
        return 0.0


def described(places: Places, name: str, job: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run in a few words: its folder, state, what it does `now`, when it wrote last, and the settings that
    distinguish it. Settings that cannot be read are missing. job: the newest one that trains there."""
    folder = places.inside(name)
    settings: Any = {}
    with suppress(OSError, UserError):
        settings = next(objects([read(places.inside(f"{name}/{RUN}"))]), {})
    settings = settings if isinstance(settings, dict) else {}
    flags, train, steps = (settings.get(key) for key in ("flags", "train", "steps"))
    epochs = train.get("epoch_count") if isinstance(train, dict) else None
    last = (last_of(folder / METRICS, LINE) or [None])[-1]
    done = last.get("step") if isinstance(last, dict) else None
    run = {"steps": steps if is_place(steps) else 0, "done": done + 1 if is_place(done) else 0}
    wrote = modified(folder / METRICS) or modified(folder / RUN)
    if job is not None and job["ended"] and job["ended"] + LATER < wrote:
        job = None  # the run went on elsewhere since
    state = state_of(run, holder(folder / LOCK) is not None, wrote, job)
    return run | {
        "folder": name,
        "state": state,
        "now": doing(places, name, run) if state in (BEGINS, RUNS) else None,
        "job": job and job["id"],
        "modified": max(wrote, job["began"] if job else 0.0),
        "epochs": epochs if is_place(epochs) else 0,
        "flags": flags if isinstance(flags, dict) else {},
        "files": sorted(entry.name for entry in folder.iterdir() if entry.suffix in PRODUCTS)
        if folder.is_dir()
        else [],
    }


def state_of(run: Mapping[str, Any], held: bool, wrote: float, job: Mapping[str, Any] | None) -> str:
    """The one state of a run and of the command that it is: whether a process holds its folder comes first, then how
    its command ended."""
    if held:
        return RUNS
    if job is not None and job["state"] == "running" and wrote + LATER < job["began"]:
        return BEGINS
    if job is not None and job["state"] == "ended" and job["code"] not in (None, 0, *STOPPED):
        return FAILED
    whole = 0 < run["steps"] <= run["done"] or (job is not None and job["state"] == "ended" and job["code"] == 0)
    return DONE if whole else BEGINS if job is not None and job["state"] == "running" and not run["done"] else HALTED


def doing(places: Places, name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """What a process that trains in a folder does now, by the files that it writes: {"what", "done", "of"}. It reads
    the base and the rows ("reads"), measures held-out rows ("measures"), answers rows before training ("before"),
    steps ("steps"), and answers rows again ("after")."""
    began = modified(places.inside(f"{name}/{LOCK}.json"))
    since = {file: modified(places.inside(f"{name}/{file}")) + LATER >= began for file in (RUN, METRICS, ANSWERS[0])}
    rows = last_of(places.inside(f"{name}/{ANSWERS[0]}"))

    def answered(when: str) -> dict[str, Any]:
        return {
            "what": when,
            "done": sum(isinstance(row, dict) and bool(row.get(when)) for row in rows),
            "of": len(rows),
        }

    if not (began and since[RUN]):
        return {"what": "reads", "done": 0, "of": 0}
    if since[METRICS] and run["done"]:
        steps = {"what": "steps", "done": run["done"], "of": run["steps"]}
        return answered("after") if rows and 0 < run["steps"] <= run["done"] else steps
    return answered("before") if rows and since[ANSWERS[0]] else {"what": "measures", "done": 0, "of": 0}


def taken(places: Places, folder: str) -> dict[str, Any]:
    """The file of a run to take, the newest or the best one; the other one of them, and what feedback has taught, if
    there are such; and why."""
    path, *_ = (places.inside(f"{folder}{name}") for name in ("", f"/{METRICS}", f"/{RUN}"))
    found = take(path)
    return {
        "file": places.name(found.path),
        "other": found.other and places.name(found.other),
        "learned": places.name(learned) if is_plain(learned := labelled(path / ADAPTER, LEARNED)) else None,
        "note": found.note.replace(f"{places.root}/", "").removeprefix("note: "),
    }


def take_back(places: Places, folder: str) -> None:
    """Delete what feedback has taught a run's adapter, which is as it was before."""
    path = places.inside(folder)
    files = (path / f"{LEARNED}{ending}" for ending in (".jsonl", ".json", ".png"))
    for file in (labelled(path / ADAPTER, LEARNED), *files):
        file.unlink(missing_ok=True)


LEAST = 5  # steps that must have been measured
# flags that change neither what a step computes nor how many rows there are
FREE = (
    *("proj_dir", "resume", "epoch_count", "random_seed", "merge_on_save", "epoch_save"),
    *("lr_init", "lr_final", "lr_schedule", "warmup_steps", "weight_decay"),
)


def measured(places: Places, words: Sequence[str]) -> dict[str, Any] | None:
    """The seconds that the steps of a run by a command's words take, how many they are, and the newest run that shows
    it; None if there is none, or if its base or data changed since."""
    wanted = entries_of(words, parser_of_train()._option_string_actions)
    for run in find_runs(places):
        if fixed(run["flags"]) != fixed(wanted) or not (steps := steps_of(run, wanted)):
            continue
        with suppress(UserError, OSError):  # a stranger's run, or one that is being moved away
            began = places.inside(f"{run['folder']}/{RUN}").stat().st_mtime
            found = list(durations(places.inside(f"{run['folder']}/{METRICS}")))
            if len(found) >= LEAST and all(changed < began for changed in changes(places.root, wanted)):
                first, *others = found  # the first step also warms up
                seconds = first + (steps - 1) * sum(others) / len(others)
                return {"seconds": seconds, "steps": steps, "run": run["folder"]}
    return None


def fixed(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {flag: value for flag, value in flags.items() if flag not in FREE}


def steps_of(run: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    """The steps of the wanted run; 0 if the number of its epochs is chosen only when it begins."""
    asked, had = (flags.get("epoch_count") for flags in (wanted, run["flags"]))
    if asked == had:
        return int(run["steps"])
    if not (run["epochs"] and isinstance(asked, str) and asked.isdecimal() and len(asked) < 10):
        return 0
    return int(run["steps"] * int(asked) // run["epochs"])


def durations(path: Path) -> Iterator[float]:
    """Yield the seconds of a run's steps."""
    for line in lines_of(path)["lines"]:
        match line:
            case {"tokens": int(tokens), "tokens_per_s": float(speed)} if 0 < tokens < 1 << 53 and speed > 0:
                yield tokens / speed


def changes(root: Path, flags: Mapping[str, Any]) -> Iterator[float]:
    """Yield when the files that a run reads were changed last."""
    given = (flags.get(name, ()) for name in ("load_model", "data_file", "val_data"))
    for name in (name for names in given for name in ([names] if isinstance(names, str) else names)):
        path = root / name
        for one in (path, Path(f"{path}.bin"), *(path.iterdir() if path.is_dir() else ())):
            with suppress(FileNotFoundError):
                yield one.stat().st_mtime
