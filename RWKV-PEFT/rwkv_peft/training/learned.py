"""Notes at the end of a run on its success, by its losses, by held-out rows, and by rows answered before and after."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters.methods import method_of
from ..checkpoints.best import HeldOut
from ..cli.names import is_number
from ..cli.parser import counted
from ..config import FEW, RunConfig
from ..config.objective import REWARDS, TEACHER
from ..plots import LOSSES, of_files
from .measuring import BeforeAfter, unended
from .rates import Rate, automatic_rate
from .step.plan import Plan

FAR, TOO_FAR = 3, 30  # a rate so many times below that of the method's rule is far below, and one so many above it
LEAST = 8  # losses, or answers: fewer do not show the noise
SURE = 2  # standard errors
KNOWN = 0.05  # nats a token: of rows with less there is little left to learn
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


def doubts(config: RunConfig, plan: Plan) -> list[str]:
    """The reasons why a run may learn too little, each with the flag that changes it."""
    return [doubt for doubt in (few_steps(config, plan), odd_rate(config)) if doubt]


def few_steps(config: RunConfig, plan: Plan) -> str:
    train = config.train
    total = plan.total_steps - train.epoch_begin * plan.epoch_steps
    if total >= FEW:
        return ""
    epochs = train.epoch_begin + -(-FEW // plan.epoch_steps)
    smaller = ", or a smaller --micro_bsz has more steps an epoch" if config.data.micro_bsz > 1 else ""
    few = f"{counted(total, 'step')} {'is' if total == 1 else 'are'} few to learn from"
    return f"{few}: --epoch_count {epochs} has {FEW} or more{smaller}"


def odd_rate(config: RunConfig) -> str:
    rate, rule, method = config.train.lr_init, rate_of(config).value, method_of(config.adapter)
    if config.adapter.states_alone or rule / FAR < rate < rule * TOO_FAR:
        return ""
    of = f"{'the model itself' if method is None else method.label} on {config.model.n_embd} channels"
    return (
        f"a rate of {rate:g} is far {'below' if rate < rule else 'above'} {rule:g}, that of {of} "
        "(docs/guides/learning-rates.md): --lr_init auto takes it"
    )


def rate_of(config: RunConfig) -> Rate:
    """The Rate that --lr_init auto takes for a run."""
    return automatic_rate(config.adapter, config.model.n_embd, config.objective, not config.train.load_model)


def reasons(config: RunConfig, plan: Plan) -> str:
    """A sentence on why a run learned too little: the doubts, or, if there are none, its rate."""
    rate, rule = config.train.lr_init, rate_of(config).value
    guess = f"low: try --lr_init {FAR * rate:.1g}" if rate < FAR * rule else f"high: --lr_init auto takes {rule:g}"
    found = "; ".join(doubts(config, plan)) or f"the rate may be too {guess}"
    return found[0].upper() + found[1:]


def notes_on(
    config: RunConfig,
    plan: Plan,
    losses: Sequence[float],
    records: Sequence[Mapping[str, Any]],
    rows: BeforeAfter | None,
) -> list[str]:
    """The notes on a run's success, by its losses, the records of its metrics and its rows before and after."""
    changed = None if rows is None else rows.changed
    found = [nothing_learned(config, plan, losses, changed), unlikely_answers(config, records)]
    # a student stops as its teacher does, and not as the rows do
    if not any(found) and rows is not None and TEACHER not in config.objective.needs and unended(rows.records):
        found.append(f"note: no answer stops as its row does yet. {reasons(config, plan)}")
    return [note for note in found if note]


def nothing_learned(config: RunConfig, plan: Plan, losses: Sequence[float], changed: bool | None) -> str:
    """A note if a run seems to have learned nothing or got worse, with the likely reason and the flag; else "".

    losses: the measure of aim_of, with its sign. changed: an answer differs from the one before training (None: not
    known). A loss of preferences may fall although the model answers as before; one of tokens is a better sign than a
    few answers.
    """
    fall = fall_of(losses)
    name, sign = aim_of(config)
    way, why = "" if fall is None else f"({fall.in_words(sign)})", reasons(config, plan)
    if fall is not None and fall.last - fall.first > fall.noise:
        lower = f"--lr_init {config.train.lr_init / FAR:.1g}"
        moved = "fell" if sign < 0 else "rose"
        return f"note: this run seems to have made the model worse: the {name} {moved} {way}. Try a lower rate: {lower}"
    if changed or (fall is None and changed is None):
        return ""
    if fall is not None and fall.real:
        still = changed is False and config.objective.of_preferences
        return f"note: the {name} fell {way}, and the rows are answered as before training. {why}" if still else ""
    if config.objective.of_tokens and fall is not None and fall.first < KNOWN:
        return f"note: the base knew these rows already, so that there was little to learn from them {way}".rstrip()
    found = []
    if fall is not None:
        found.append(f"the {name} did not {'rise' if sign < 0 else 'fall'} by more than its noise {way}")
    if changed is False:
        found.append("the rows are answered as before training")
    return f"note: this run seems to have learned nothing: {' and '.join(found)}. {why}"


def unlikely_answers(config: RunConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """A note if a run on pairs made the chosen answers less likely themselves: margins then grow in a model that comes
    to answer in neither way (Pal et al. 2024, arXiv 2402.13228); else ""."""
    if config.objective.unit != "pair":
        return ""
    found = ""
    for name, sign in (("chosen", 1), ("nll", -1)):  # the gain over the base, which begins at 0; the loss
        values = [sign * record[name] for record in records if is_number(record.get(name))]
        if (fall := fall_of(values)) and fall.last < (fall.first - fall.noise if sign < 0 else 0.0):
            found = f"{name} {fall.in_words(sign)}"
    if not found:
        return ""
    return (
        f"note: the chosen answers became less likely themselves ({found}), so that the model may answer in neither "
        "way, whatever accuracy and margin say; a lower --lr_init, --dpo_nll 1 or --objective orpo keeps them likely"
    )


def held_out_line(held_out: HeldOut, name: str, sign: int) -> str:
    """The course of a run's measure on held-out rows, with the best value last; the sign is aim_of's."""
    (step, lowest), (_, last) = held_out.lowest, held_out.losses[-1]
    before = "" if held_out.start is None else f"{shown(held_out.start, sign)} before training, "
    best = f"{'lowest' if sign > 0 else 'highest'} {name} {shown(lowest, sign)}"
    return f"{name} {before}{shown(last, sign)} at the end; after step {step:,} the {best}"


def overfitted(held_out: HeldOut, plan: Plan, best: Path, rate: float) -> str:
    """A note if the held-out loss never fell, or rose again by much of its fall, with the remedy; else ""."""
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
