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

LEAST = 8  # losses, or answers: fewer do not show the noise
SURE = 2  # standard errors
LATE = 0.1  # a run is still learning if its second half made more than this share of the fall
UNKNOWN = "none: how well it does on other rows is not known (--val_split 0.1 holds some back, and tells)"


class Fall(NamedTuple):
    """The mean loss of the first and of the last quarter of a run's steps, and the part of a fall that may be noise."""

    first: float
    last: float
    noise: float

    @property
    def real(self) -> bool:
        return self.first - self.last > self.noise

    def in_words(self, sign: int) -> str:
        """Both means as they stand in the metrics, which are `sign` (1 or -1) times a loss."""
        return f"{shown(self.first, sign)} to {shown(self.last, sign)}"


def shown(value: float, sign: int) -> str:
    """A loss as it stands in the metrics, which are `sign` (1 or -1) times it."""
    return f"{sign * value + 0.0:.4f}"  # + 0.0: no -0.0000


def fall_of(losses: Sequence[float]) -> Fall | None:
    """The Fall of a run's losses in their order; None if they are fewer than LEAST. The noise is estimated by the
    differences of neighbours (von Neumann 1941), to which a slow fall adds little."""
    if len(losses) < LEAST:
        return None
    quarter = len(losses) // 4
    variance = statistics.fmean((b - a) ** 2 for a, b in zip(losses, losses[1:])) / 2
    noise = SURE * math.sqrt(2 * variance / quarter)
    return Fall(statistics.fmean(losses[:quarter]), statistics.fmean(losses[-quarter:]), noise)


def by_source(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line on the losses of each of several data files: means of the first and the last quarter of them."""
    names = dict.fromkeys(found for record in records for found in of_files(record))
    for name, loss, source in sorted(names, key=lambda found: found[1] != "loss"):
        values = [record[name] for record in records if is_number(record.get(name))]
        quarter = max(1, len(values) // 4)
        first, last = statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])
        yield f"{LOSSES[loss]} of {source}: {first:.4f} at first, {last:.4f} at last"


def aim_of(config: RunConfig) -> tuple[str, int]:
    """The name of a run's measure in the metrics, and the sign with which it is to fall."""
    return ("reward", -1) if REWARDS in config.objective.needs else ("loss", 1)


def notes_on(
    config: RunConfig,
    plan: Plan,
    losses: Sequence[float],
    records: Sequence[Mapping[str, Any]],
    rows: BeforeAfter | None,
) -> list[str]:
    """The notes on a run's success, by its losses, the records of its metrics and its rows before and after."""
    changed = None if rows is None else rows.changed
    notes = [on_losses(config, plan, losses, changed), unlikely_answers(config, records)]
    # a student stops as its teacher does, and not as the rows do
    if rows is not None and changed and TEACHER not in config.objective.needs and unended(rows.records):
        notes.append("note: no answer stops as its row does yet")
    return [note for note in notes if note]


def on_losses(config: RunConfig, plan: Plan, losses: Sequence[float], changed: bool | None) -> str:
    """A note if the measure got worse, got no better, or was still getting better at the end; else "".

    losses: the measure of aim_of, with its sign. changed: an answer differs from the one before training (None: not
    known). Another rate is advised only if the losses of this run ask for it.
    """
    (name, sign), rate = aim_of(config), config.train.lr_init
    fall, late = fall_of(losses), fall_of(losses[len(losses) // 2 :])
    same = "the rows are answered as before training" if changed is False else ""
    if fall is None:
        return same and f"note: {same}"
    numbers, tail = fall.in_words(sign), same and f", and {same}"
    if fall.last - fall.first > fall.noise:
        return f"note: the {name} got worse ({numbers}){tail}; try a lower rate: --lr_init {rate / 3:.1g}"
    if not fall.real:
        return "" if changed else f"note: the {name} got no better than by its noise ({numbers}){tail}"
    if late is not None and late.real and late.first - late.last > LATE * (fall.first - fall.last):
        epochs = 2 * -(-plan.total_steps // plan.epoch_steps)
        return (
            f"note: the {name} was still getting better at the end ({late.in_words(sign)}){tail}; try more steps, "
            f"--epoch_count {epochs}, or a higher rate, --lr_init {rate * 3:.1g}"
        )
    return f"note: the {name} got better ({numbers}){tail}" if same and config.objective.of_preferences else ""


def unlikely_answers(config: RunConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """A note if a run on pairs made the chosen answers less likely themselves: margins then grow in a model that comes
    to answer in neither way (Pal et al. 2024, arXiv 2402.13228); else ""."""
    if config.objective.unit != "pair":
        return ""
    course = ""
    for name, sign in (("chosen", 1), ("nll", -1)):  # the gain over the base, which begins at 0; the loss
        values = [sign * record[name] for record in records if is_number(record.get(name))]
        if (fall := fall_of(values)) and fall.last < (fall.first - fall.noise if sign < 0 else 0.0):
            course = f"{name} {fall.in_words(sign)}"
    if not course:
        return ""
    return (
        f"note: the chosen answers became less likely themselves ({course}), so that the model may answer in neither "
        "way, whatever accuracy and margin say; a lower --lr_init, --dpo_nll 1 or --objective orpo keeps them likely"
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
        return (
            f"note: the held-out rows were known better before training ({held_out.first:.4f}, and {lowest:.4f} at "
            "best): this run learned nothing that holds for other rows. Their answers may not follow from the "
            "questions, or the rows may be too few"
        )
    if not held_out.rose:
        return ""
    epochs = -(-step // plan.epoch_steps)
    fewer = f"--epoch_count {epochs}, or " if epochs * plan.epoch_steps < plan.total_steps else ""
    return (
        f"note: after step {step:,} the run learned its own rows by heart, and forgot others: commands take {best} of "
        f"this folder. What ends sooner: {fewer}--early_stop 2. More rows help most"
    )
