"""Which file of a run to take: the newest, or that of the lowest validation loss if it holds clearly better.

python RWKV-PEFT/rwkv_peft/children.py rwkv_peft.files.best FOLDER      prints its path; on stderr why, if it is not
                                                                        the newest
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ..errors import UserError, exit_on_user_error
from ..names import ADAPTER, METRICS, MODEL, RUN
from .readable import read_settings

BEST = "best"  # the label of the tensors with the lowest validation loss
SINCE = "validated_from"  # in a run's RUN: the sample from which on it validated on the same rows
LONGEST = 1 << 24  # bytes of a line, more than a run writes
LOST = 0.05  # a share of the fall: a run that loses more of it after its lowest loss has gone on for too long
CLOSE = 0.01  # losses that differ by a smaller share are the same


class HeldOut(NamedTuple):
    """The validation losses of a run: `start` before the first step (None: not measured), then (steps done, loss)."""

    start: float | None
    losses: list[tuple[int, float]]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], since: int = 0) -> "HeldOut":
        """Those in a run's records that end after sample `since`, from which on it validated on the same rows."""
        start, losses = None, []
        for record in records:
            if start is None and is_loss(record.get("val_start")):
                start = record["val_start"]
            if is_loss(record.get("val_loss")) and record.get("samples", 1) > since:
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
        """Tell whether the last loss is clearly above the lowest: by a share of the fall, and of itself."""
        lowest, last = self.lowest[1], self.losses[-1][1]
        return last - lowest > LOST * max(self.first - lowest, 0.0) and not math.isclose(last, lowest, rel_tol=CLOSE)


class Taken(NamedTuple):
    """The file of a run to take; the other one, the newest or the best, if there is one; and a note that says why if
    it is not the newest, else ""."""

    path: Path
    other: Path | None = None
    note: str = ""


def is_loss(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and math.isfinite(value)


def labelled(path: Path, label: str) -> Path:
    """Add a label to a path: adapter.safetensors -> adapter-LABEL.safetensors; "", that of the newest, adds nothing."""
    return path.with_stem(f"{path.stem}-{label}") if label else path


def take(folder: Path, name: str = "") -> Taken:
    """Choose between the newest file `name` in the folder of a run (the model's or else the adapter's) and its best."""
    newest = folder / (name or (MODEL if (folder / MODEL).is_file() else ADAPTER))
    best = labelled(newest, BEST)
    if not (newest.is_file() and best.is_file()):
        return Taken(newest)
    held_out = HeldOut.of(validations(folder / METRICS), since_of(folder))
    if not held_out.losses or not held_out.rose:
        return Taken(newest, best)
    (step, lowest), (end, last) = held_out.lowest, held_out.losses[-1]
    note = (
        f"note: {best} is taken: its validation loss, after step {step:,}, is {lowest:.4f}, and was {last:.4f} after "
        f"step {end:,}; to take what trained last, name {newest}"
    )
    return Taken(best, newest, note)


def since_of(folder: Path) -> int:
    path, since = folder / RUN, None
    if path.is_file():  # a pipe would be waited for
        with suppress(UserError):  # a broken one tells nothing
            since = read_settings(path).get(SINCE)
    return since if type(since) is int else 0


def validations(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records in a run's metrics that tell of validation; broken lines are left out."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in iter(partial(file.readline, LONGEST), b""):
            if len(line) == LONGEST:
                return
            if b'"val_' in line:
                with suppress(ValueError, RecursionError):
                    found = json.loads(line)
                    if isinstance(found, dict) and is_record(found):
                        yield found


def is_record(found: Mapping[str, Any]) -> bool:
    return all(type(found.get(name, default)) is int for name, default in (("step", None), ("samples", 1)))


def main(argv: list[str]) -> int:
    (folder,) = argv
    found = take(Path(folder))
    if found.note:
        print(found.note, file=sys.stderr)
    print(found.path)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
