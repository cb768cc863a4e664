"""Notes at the end of a run on its success, by its losses, by held-out rows, and by rows answered before and after."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.best import HeldOut
from ..cli.names import is_number
from ..config import RunConfig
from ..config.objective import REWARDS, TEACHER
from ..plots import LOSSES, of_files
from .measuring import BeforeAfter, unended
from .step.plan import Plan

LEAST = 8  # losses: fewer do not show their noise
UNKNOWN = "none: how well it does on other rows is not known (--val_split 0.1 holds some back, and tells)"


class Quarters(NamedTuple):
    """The means of the first and of the last quarter of some values, and the largest difference that may be noise."""

    first: float
    last: float
    noise: float

    def in_words(self, sign: int) -> str:
        """Both means as they stand in the metrics, which are `sign` (1 or -1) times a loss."""
        return f"{shown(self.first, sign)} to {shown(self.last, sign)}"


def shown(value: float, sign: int) -> str:
    """A loss as it stands in the metrics, which are `sign` (1 or -1) times it."""
    return f"{sign * value + 0.0:.4f}"  # + 0.0: no -0.0000


def quarters_of(values: Sequence[float]) -> Quarters | None:
    """The Quarters of a run's values in their order; None if they are fewer than LEAST."""
    if len(values) < LEAST:
        return None
    quarter = len(values) // 4
    # by differences of neighbours (von Neumann 1941): a slow fall adds little to them, and much to a plain variance
    variance = statistics.fmean((b - a) ** 2 for a, b in zip(values, values[1:])) / 2
    noise = 2 * math.sqrt(2 * variance / quarter)  # two standard errors
    return Quarters(statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:]), noise)


def by_source(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line on the losses of each of several data files: means of the first and the last quarter of them."""
    names = dict.fromkeys(name for record in records for name in of_files(record))
    for name, loss, source in sorted(names, key=lambda parts: parts[1] != "loss"):
        values = [record[name] for record in records if is_number(record.get(name))]
        quarter = max(1, len(values) // 4)
        first, last = statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])
        yield f"{LOSSES[loss]} of {source}: {first:.4f} at first, {last:.4f} at last"


def aim_of(config: RunConfig) -> tuple[str, int]:
    """The name of a run's measure in the metrics, and the sign with which it is to fall."""
    return ("reward", -1) if REWARDS in config.objective.needs else ("loss", 1)


def notes_on(
    config: RunConfig, losses: Sequence[float], records: Sequence[Mapping[str, Any]], rows: BeforeAfter | None
) -> Iterator[str]:
    """Yield notes on a run by its losses (the measure of aim_of, with its sign), metrics, and rows before and after."""
    (name, sign), quarters = aim_of(config), quarters_of(losses)
    changed = None if rows is None else rows.changed  # None: not known
    improved = quarters is not None and quarters.first - quarters.last > quarters.noise
    if quarters is not None and quarters.last - quarters.first > quarters.noise:
        rate = f"--lr_init {config.train.lr_init / 3:.1g}"
        yield f"note: the {name} got worse ({quarters.in_words(sign)}); try a lower rate: {rate}"
    elif quarters is not None and not improved and not changed:
        yield f"note: the {name} got no better than by its noise ({quarters.in_words(sign)})"
    # a loss of preferences falls without a change of any answer
    if changed is False and (not improved or config.objective.of_preferences):
        yield "note: the rows are answered as before training"
    # a student stops as its teacher does, and not as the rows do
    if rows is not None and changed and TEACHER not in config.objective.needs and unended(rows.records):
        yield "note: no answer stops as its row does yet"
    # margins also grow in a model that comes to answer in neither way (Pal et al. 2024, arXiv 2402.13228)
    for figure in ("chosen", "nll") if config.objective.unit == "pair" else ():
        chosen = quarters_of([record[figure] for record in records if is_number(record.get(figure))])
        if chosen and (chosen.last < 0 if figure == "chosen" else chosen.last > chosen.first + chosen.noise):
            yield (
                f"note: the chosen answers became less likely ({figure} {chosen.in_words(1)}), whatever accuracy and "
                "margin say; a lower --lr_init, --dpo_nll 1 or --objective orpo keeps them likely"
            )


def held_out_line(held_out: HeldOut, name: str, sign: int) -> str:
    """The course of a run's measure on held-out rows, with the best value last; the sign is aim_of's."""
    (step, lowest), (_, last) = held_out.lowest, held_out.losses[-1]
    before = "" if held_out.start is None else f"{shown(held_out.start, sign)} before training, "
    best = f"{'lowest' if sign > 0 else 'highest'} {name} {shown(lowest, sign)}"
    return f"{name} {before}{shown(last, sign)} at the end; after step {step:,} the {best}"


def overfitted(held_out: HeldOut, plan: Plan, best: Path) -> str:
    """A note if the held-out loss never fell, or rose again by much of its fall, with the remedy; else ""."""
    step, lowest = held_out.lowest
    if not lowest < held_out.first:
        before = f"{held_out.first:.4f}, and {lowest:.4f} at best"
        return (
            f"note: the held-out rows were known better before training ({before}): nothing that holds for other rows"
        )
    if not held_out.rose:
        return ""
    epochs = -(-step // plan.epoch_steps)
    fewer = f"--epoch_count {epochs} or " if epochs * plan.epoch_steps < plan.total_steps else ""
    return (
        f"note: the held-out loss rose after step {step:,}: commands take {best} of this folder. {fewer}--early_stop 2 "
        "ends sooner; more rows help most"
    )
