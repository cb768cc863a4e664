"""Read and write files of lines, such as metrics.jsonl, which a resumed run goes on with from its first step."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import write_text
from ...cli.numeric import is_number
from ...plots import read_metrics
from ..step.plan import Plan


class Lowest:
    """The lowest validation loss of a run's records, in their order, and how many validations came since."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.loss, self.since = math.inf, 0
        for record in records:
            if is_number(record.get("val_loss")):
                self.note(record["val_loss"])

    def note(self, loss: float) -> bool:
        """Remember one validation loss; tell whether it is the lowest so far."""
        better = loss < self.loss
        self.loss, self.since = (loss, 0) if better else (self.loss, self.since + 1)
        return better

    def exhausts(self, patience: int) -> bool:
        """Tell whether at least `patience` validations in a row were not lower; never for 0."""
        return 0 < patience <= self.since


def history(path: Path, plan: Plan, since: int = 0) -> list[dict[str, Any]]:
    """Read the records of a file of lines whose steps ended after sample `since` and by the first sample of a Plan; []
    if there is no file. Their "step" is the Plan's: if steps had another size, the one in which the record's samples
    would have ended."""
    found = []
    for record in read_metrics(path) if path.exists() else ():
        if since < (samples := record.get("samples", 0)) <= plan.first_sample:
            found.append(record | {"step": max(samples // plan.step_samples - 1, 0)})
    return found


def forget_rest(path: Path, plan: Plan) -> None:
    """Keep only the history in a file of lines, because a resumed run writes the later records again."""
    if not path.exists():
        return
    write_records(path, history(path, plan))


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of lines, a record each, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
