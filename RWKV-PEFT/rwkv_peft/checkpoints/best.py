"""The file of a run to take: the newest, or the one with the lowest validation loss if that is clearly better."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ..cli.names import ADAPTER, FORGETTING, METRICS, MODEL, RUN, is_finite, is_whole
from .readable import object_in, object_of

BEST = "best"  # the label of the tensors with the lowest validation loss
SINCE = "validated_from"  # in a run's RUN: the sample from which on it validated on the same rows
LONGEST = 1 << 24  # bytes of a line, more than a run writes
LOST = 0.05  # a share of the fall: a run that loses more of it after its lowest loss has gone on for too long
CLOSE = 0.01  # losses that differ by a smaller share are the same
LAST_STEP = 1 << 53  # the largest number of a step: a float, as it is drawn, tells it from its neighbours


class HeldOut(NamedTuple):
    """The validation losses of a run: `start` before the first step (None: not measured), then (steps done, loss)."""

    start: float | None
    losses: list[tuple[int, float]]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], since: int = 0) -> "HeldOut":
        """Those in a run's records that end after sample `since`, from which on it validated on the same rows."""
        start, losses = None, []
        for record in records:
            if start is None and is_finite(record.get("val_start")):
                start = record["val_start"]
            if is_finite(record.get("val_loss")) and record.get("samples", 1) > since:
                losses.append((record["step"] + 1, record["val_loss"]))
        return cls(None if since else start, losses)

    @property
    def first(self) -> float:
        return self.losses[0][1] if self.start is None else self.start

    @property
    def lowest(self) -> tuple[int, float]:
        """(steps done, loss) of the lowest one, the first of equal ones."""
        return min(self.losses, key=lambda one: one[1])

    @property
    def rose(self) -> bool:
        """True if the last loss is clearly above the lowest: by a share of the fall, and of itself."""
        lowest, last = self.lowest[1], self.losses[-1][1]
        return last - lowest > LOST * max(self.first - lowest, 0.0) and not math.isclose(last, lowest, rel_tol=CLOSE)


class RunFile(NamedTuple):
    """The file of a run to take; the other one, the newest or the best, if there is one; and a note with the
    reason if it is not the newest, else ""."""

    path: Path
    other: Path | None = None
    note: str = ""


def labelled(path: Path, label: str) -> Path:
    """Add a label to a path: adapter.safetensors -> adapter-LABEL.safetensors; "", the newest's, adds nothing."""
    return path.with_stem(f"{path.stem}-{label}") if label else path


def take(folder: Path, name: str = "") -> RunFile:
    """Choose between the newest file `name` in the folder of a run (the model's or else the adapter's) and its best.
    The newest is what --forget_at_most bounds."""
    newest = folder / (name or (MODEL if (folder / MODEL).is_file() else ADAPTER))
    best = labelled(newest, BEST)
    if not (newest.is_file() and best.is_file()):
        return RunFile(newest)
    held_out = HeldOut.of(validations(folder / METRICS), since_of(folder))
    if not held_out.losses or not held_out.rose or (folder / FORGETTING).is_file():
        return RunFile(newest, best)
    (step, lowest), (end, last) = held_out.lowest, held_out.losses[-1]
    note = (
        f"note: {best} is taken: its validation loss, after step {step:,}, is {lowest:.4f}, and was {last:.4f} after "
        f"step {end:,}; to take what trained last, name {newest}"
    )
    return RunFile(best, newest, note)


def since_of(folder: Path) -> int:
    since = object_in(folder / RUN).get(SINCE)
    return since if is_whole(since) else 0


def validations(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of validation in a run's metrics; broken lines are left out."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in iter(partial(file.readline, LONGEST), b""):
            if len(line) == LONGEST:
                return
            if b'"val_' in line and is_record(record := object_of(line)):
                yield record


def is_record(value: object) -> TypeGuard[dict[str, Any]]:
    """True if a value is a record of metrics.jsonl: an object with its step and, in later versions, its samples."""
    places = (value.get("step"), value.get("samples", 0)) if isinstance(value, dict) else (None,)
    return all(map(is_place, places))


def is_place(value: object) -> TypeGuard[int]:
    """True if a value can be the number of a step, or of the samples up to its end."""
    return is_whole(value, 0) and value <= LAST_STEP
