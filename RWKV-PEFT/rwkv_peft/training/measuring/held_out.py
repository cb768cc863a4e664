"""Judge by the losses of held-out rows whether a run learned what holds for other rows, or its own rows by heart."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ...checkpoints.best import HeldOut
from ..step.plan import Plan
from .learned import KNOWN, LEAST, SURE, shown

UNKNOWN = "none: how well it does on other rows is not known (--val_split 0.1 holds some back, and tells)"


def told(held_out: HeldOut, name: str, sign: int) -> str:
    """Say how a run's measure went, whose `sign` (1 or -1) multiple is to fall; the best stands last."""
    (step, lowest), (_, last) = held_out.lowest, held_out.losses[-1]
    before = "" if held_out.start is None else f"{shown(held_out.start, sign)} before training, "
    best = f"{'lowest' if sign > 0 else 'highest'} {name} {shown(lowest, sign)}"
    return f"{name} {before}{shown(last, sign)} at the end; after step {step:,} the {best}"


def doubt(held_out: HeldOut, plan: Plan, best: Path, rate: float) -> str:
    """A note if the loss never fell, or rose again by much of its fall, with the remedy; "" if all is well."""
    step, lowest = held_out.lowest
    if not lowest < held_out.first:
        known = f"known better before training ({held_out.first:.4f}, and {lowest:.4f} at best)"
        if held_out.first < KNOWN:
            return f"note: the held-out rows were {known}: the base has learned such rows already"
        return (
            f"note: the held-out rows were {known}: this run learned nothing that holds for other rows. Their answers "
            "may not follow from the questions, the rows may be too few, or the rate too high: try "
            f"--lr_init {rate / 3:.1g}"
        )
    if not held_out.rose:
        return ""
    epochs = -(-step // plan.epoch_steps)
    fewer = f"--epoch_count {epochs}, or " if epochs * plan.epoch_steps < plan.total_steps else ""
    return (
        f"note: after step {step:,} the run learned its own rows by heart, and forgot others: commands take {best} of "
        f"this folder. What ends sooner: {fewer}--early_stop 2. More rows help most"
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
