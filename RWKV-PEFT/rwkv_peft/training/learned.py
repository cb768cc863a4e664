"""Notes at the end of a run: its losses at first and at last, of training and of held-out rows, and answers to rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..checkpoints.best import HeldOut
from ..config import RunConfig
from ..config.objective import REWARDS, TEACHER
from ..plots import LOSSES, of_files, series
from .measuring import BeforeAfter, unended

Records = Sequence[dict[str, Any]]  # of metrics.jsonl, in the order of steps
UNKNOWN = "none: how well it does on other rows is not known (--val_split 0.1 holds some back, and tells)"


def quarters_of(records: Records, name: str) -> tuple[float, float]:
    """The means of the first and of the last quarter of a measure in a run's records; nan if no record has it."""
    values = series(records, name)[1] or [float("nan")]
    quarter = max(1, len(values) // 4)
    return fmean(values[:quarter]), fmean(values[-quarter:])


def by_source(records: Records) -> Iterator[str]:
    """Yield a line on the losses of each of several data files."""
    names = dict.fromkeys(name for record in records for name in of_files(record))
    for name, loss, source in sorted(names, key=lambda parts: parts[1] != "loss"):
        first, last = quarters_of(records, name)
        yield f"{LOSSES[loss]} of {source}: {first:.4f} at first, {last:.4f} at last"


def aim_of(config: RunConfig) -> tuple[str, int]:
    """(the name of a run's measure in the metrics, the sign with which it is to fall)."""
    return ("reward", -1) if REWARDS in config.objective.needs else ("loss", 1)


def notes_on(config: RunConfig, records: Records, rows: BeforeAfter | None) -> Iterator[str]:
    """Yield notes on a run by its metrics and by rows that it answered before and after."""
    (name, sign), (first, last) = aim_of(config), quarters_of(records, aim_of(config)[0])
    if len(records) >= 8 and sign * last > sign * first:  # the noise of fewer steps hides what they learned
        yield f"note: the {name} got no better ({first:.4f} to {last:.4f}); try another --lr_init"
    if rows is not None and rows.changed is False:
        yield "note: the rows are answered as before training"
    # a student stops as its teacher does, and not as the rows do
    elif rows is not None and rows.changed and TEACHER not in config.objective.needs and unended(rows.records):
        yield "note: no answer stops as its row does yet"
    # margins also grow in a model that comes to answer in neither way (Pal et al. 2024, arXiv 2402.13228)
    if config.objective.unit == "pair" and quarters_of(records, "chosen")[1] < 0:
        yield "note: the chosen answers became less likely; a lower --lr_init, --dpo_nll 1 or --objective orpo helps"


def on_held_out(held_out: HeldOut, name: str, sign: int, best: Path | None) -> Iterator[str]:
    """Yield the course of a run's measure on held-out rows; then a note if its last value is not near its best.
    best: the file that commands take then, or None."""
    (step, lowest), last = held_out.lowest, held_out.losses[-1][1]
    first, lowest_shown, last_shown = (f"{sign * loss + 0.0:.4f}" for loss in (held_out.first, lowest, last))  # no -0
    yield f"{name} {first} at first, {last_shown} at the end; after step {step:,} the best {name} {lowest_shown}"
    if lowest >= held_out.first and sign > 0:
        yield "note: the held-out rows were known better before training: nothing was learned that holds for other rows"
    elif held_out.rose and sign > 0:
        takes = f"commands take {best}; " if best else ""
        yield f"note: the held-out loss rose after step {step:,}: {takes}--early_stop 2 ends sooner"
