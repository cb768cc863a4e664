"""Reads the results of a comparison's complete runs from their folders: result.json and the metrics."""

import math
import statistics
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoints.readable import read_settings, require_readable
from ...cli.errors import UserError, quoted
from ...cli.numeric import is_number
from ...plots import metrics_of, read_metrics
from .plan import HIGHEST, LOWEST, Cell

RESULT = "result.json"
LARGEST = 1e30  # of a measured number: sums and squares of such numbers stay finite
REMEDY = "remove the folder of that run, which the same command then runs again"


class Outcome(NamedTuple):
    """A complete run: loss is the last validation's, infinite if the run diverged; validations are (steps done, seconds
    of training, loss); step_ms is the median time of a step; peak_mb the largest resident memory of the process (10^6
    bytes); retained the losses on --retain_data, before the first step and at each validation, () without the flag."""

    cell: Cell
    loss: float
    validations: tuple[tuple[int, float, float], ...]
    step_ms: float
    peak_mb: float
    retained: tuple[float, ...] = ()


def read_outcome(folder: Path) -> Outcome:
    """The Outcome of the complete run in a folder. Raises UserError if its files are damaged."""
    cell, diverged, peak_mb = read_result(folder)
    path = metrics_of(folder)
    records = read_metrics(path) if path.is_file() else []
    # tokens_per_s is rounded to 0.1 and may read 0
    seconds = [number(record, "tokens", path) / max(number(record, "tokens_per_s", path), 0.1) for record in records]
    validations = tuple(
        (record["step"] + 1, spent, number(record, "val_loss", path))
        for record, spent in zip(records, accumulate(seconds))
        if record.get("val_loss") is not None
    )
    if not validations and not diverged:
        raise UserError(f"{path}: no validation loss, and {RESULT} beside it says that the run was complete; {REMEDY}")
    loss = math.inf if diverged else validations[-1][2]
    names = ("retain_start", "retain_loss")
    return Outcome(
        cell,
        loss if math.isfinite(loss) else math.inf,
        validations,
        1e3 * statistics.median(seconds) if seconds else math.nan,
        peak_mb,
        tuple(number(record, name, path) for record in records for name in names if name in record),
    )


def read_result(folder: Path) -> tuple[Cell, bool, float]:
    """(the Cell, whether it diverged, peak_mb) of a run's result.json."""
    path = require_readable(folder / RESULT, f"{folder / RESULT}: no such file", again=True)
    result = read_settings(path)
    match result:
        case {"method": str(method), "rate": int(rate), "seed": int(seed), "diverged": bool(diverged)} if (
            LOWEST <= rate <= HIGHEST and Cell(method, rate, seed).folder == folder.name
        ):
            return Cell(method, rate, seed), diverged, number(result, "peak_mb", path)
    raise UserError(f"{path} is not the result of the run that its folder names; {REMEDY}")


def number(record: Mapping[str, Any], name: str, path: Path) -> float:
    """A record's number under a name, NaN and infinity included. Raises UserError for another value, or a huge one."""
    value = record.get(name)
    if not is_number(value) or math.isfinite(value) and abs(value) > LARGEST:
        raise UserError(f"{path}: {name} is {quoted(value)}, and a number is due; {REMEDY}")
    return float(value)
