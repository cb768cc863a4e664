"""Judge by the losses of held-out rows whether a run learned what holds for other rows, or its own rows by heart."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...plots import is_number
from ..step.plan import Plan
from .learned import LEAST, SURE, shown

UNKNOWN = "none: how well it answers other rows is not known (--val_split 0.1 holds some back, and tells)"
LOST = 0.05  # a share of the fall: a run that loses more of it after its lowest loss has gone on for too long


class HeldOut(NamedTuple):
    """The validation losses of a run: `start` before the first step (None: not measured), then (steps done, loss)."""

    start: float | None
    losses: Sequence[tuple[int, float]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], since: int = 0) -> "HeldOut":
        """Those in a run's records that end after sample `since`, from which on it validated on the same rows."""
        start = next((one["val_start"] for one in records if is_number(one.get("val_start"))), None)
        losses = [
            (record["step"] + 1, record["val_loss"])
            for record in records
            if is_number(record.get("val_loss")) and record.get("samples", 1) > since
        ]
        return cls(None if since else start, losses)

    @property
    def lowest(self) -> tuple[int, float]:
        """(steps done, loss) of the lowest one, the first of equal ones."""
        return min(self.losses, key=lambda one: one[1])

    def told(self, name: str, sign: int) -> str:
        """Say how a run's measure went, whose `sign` (1 or -1) multiple is to fall; the best stands last."""
        (step, lowest), (_, last) = self.lowest, self.losses[-1]
        before = "" if self.start is None else f"{shown(self.start, sign)} before training, "
        best = f"{'lowest' if sign > 0 else 'highest'} {name} {shown(lowest, sign)}"
        return f"{name} {before}{shown(last, sign)} at the end; after step {step:,} the {best}"

    def note(self, plan: Plan, best: Path, rate: float) -> str:
        """A note if the loss never fell, or rose again by much of its fall, with the remedy; "" if all is well."""
        (step, lowest), (_, last) = self.lowest, self.losses[-1]
        first = self.losses[0][1] if self.start is None else self.start
        if not lowest < first:
            return (
                f"note: the held-out rows were known better before training ({first:.4f}, and {lowest:.4f} at best): "
                "this run learned nothing that holds for other rows. Their answers may not follow from the questions, "
                f"the rows may be too few, or the rate too high: try --lr_init {rate / 3:.1g}"
            )
        if last - lowest <= LOST * (first - lowest) or math.isclose(last, lowest, rel_tol=0.01):
            return ""
        epochs = -(-step // plan.epoch_steps)
        fewer = f"--epoch_count {epochs}, or " if epochs * plan.epoch_steps < plan.total_steps else ""
        return (
            f"note: after step {step:,} the run learned its own rows by heart, and forgot others: take {best}, or "
            f"end sooner: {fewer}--early_stop 2. More rows help most"
        )


def blind(losses: Sequence[Sequence[float]]) -> str:
    """A note if answers are no likelier behind their own prompts than behind others, by the losses [(behind its own,
    behind another)] of each; "" if they are, or if too few answers tell."""
    if len(losses) < LEAST:
        return ""
    gains = [other - own for own, other in losses]
    if statistics.fmean(gains) > SURE * statistics.stdev(gains) / math.sqrt(len(gains)):
        return ""
    own, other = (statistics.fmean(column) for column in zip(*losses))
    return (
        f"note: held-out answers are no likelier behind their own questions ({own:.4f} nats a token) than behind those "
        f"of other rows ({other:.4f}): this run learned how answers look, and not what they say. They may not follow "
        "from the questions, or that may take more rows or steps"
    )
