"""How long a run will take, as measured in an earlier one with the same settings on the same files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...cli.errors import UserError
from ...cli.names import METRICS, RUN
from ...training.flags.parser import entries_of, parser_of_train
from .lines import lines_of
from .places import Places
from .runs import find_runs

LEAST = 5  # steps that must have been measured
# flags that change neither what a step computes nor how many rows there are
FREE = (
    *("proj_dir", "resume", "epoch_count", "random_seed", "merge_on_save", "epoch_save"),
    *("lr_init", "lr_final", "lr_schedule", "warmup_steps", "weight_decay"),
)


def measured(places: Places, words: Sequence[str]) -> dict[str, Any] | None:
    """The seconds that the steps of a run by a command's words take, how many they are, and the newest run that tells;
    None if there is none, or if its base or data changed since."""
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
    """The steps of the wanted run; 0 if the number of its epochs is not known before it begins."""
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
