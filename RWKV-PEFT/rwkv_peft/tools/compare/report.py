"""The results of a comparison, as rows of one table and as lines of JSON."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .outcomes import Outcome
from .plan import Cell, best_rate, rate_of
from .sizes import Size

REFERENCE = "lora"  # the table has the steps that each method takes to its final loss


class Row(NamedTuple):
    """A method at its best rate: losses are the final ones of all complete seeds, runs their Outcomes."""

    method: str
    size: Size
    rate: int
    losses: tuple[float, ...]
    runs: tuple[Outcome, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        return spread(self.losses)

    @property
    def retained(self) -> tuple[float, ...]:
        """The final losses on --retain_data of all seeds, infinite if a run diverged; () without such data."""
        return tuple(run.retained[-1] if math.isfinite(run.loss) else math.inf for run in self.measured)

    @property
    def changes(self) -> tuple[float, ...]:
        """The rise of each of them above the loss before the first step."""
        return tuple(loss - run.retained[0] for loss, run in zip(self.retained, self.measured))

    @property
    def measured(self) -> tuple[Outcome, ...]:
        return tuple(run for run in self.runs if run.retained)


def spread(values: Iterable[float]) -> float:
    """The standard deviation of the finite values, NaN if there are fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.stdev(finite) if len(finite) > 1 else math.nan


def rows_of(
    methods: Sequence[str], seeds: Sequence[int], sizes: Mapping[str, Size], outcomes: Mapping[Cell, Outcome]
) -> list[Row]:
    """A Row for each method with a complete run of the first seed, the lowest mean loss first."""
    losses = {cell: outcome.loss for cell, outcome in outcomes.items()}
    rows = []
    for method in methods:
        rate = best_rate(method, seeds[0], losses)
        if rate is None:
            continue
        runs = tuple(outcomes[cell] for seed in seeds if (cell := Cell(method, rate, seed)) in outcomes)
        rows.append(Row(method, sizes[method], rate, tuple(run.loss for run in runs), runs))
    return sorted(rows, key=lambda row: row.mean)


def common_rate(methods: Sequence[str], seed: int, losses: Mapping[Cell, float]) -> int | None:
    """The number of the rate with the lowest mean loss over methods, among the rates that all of them have run without
    diverging; None if there is none."""
    rates = {cell.rate for cell in losses}
    means = {
        rate: statistics.fmean(losses.get(Cell(method, rate, seed), math.inf) for method in methods) for rate in rates
    }
    finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=lambda rate: (finite[rate], rate)) if finite else None


def mean_curve(runs: Iterable[Outcome]) -> list[tuple[int, float, list[float]]]:
    """[(steps done, mean seconds, losses)] at each validation that all runs have."""
    return [
        (points[0][0], statistics.fmean(point[1] for point in points), [point[2] for point in points])
        for points in zip(*(run.validations for run in runs))
    ]


def steps_to(row: Row, loss: float) -> int | None:
    """The steps done at the first validation at which a row's mean loss is at most `loss`; None if it never is."""
    return next((done for done, _, losses in mean_curve(row.runs) if statistics.fmean(losses) <= loss), None)


def retained_curve(row: Row) -> list[tuple[float, float]]:
    """[(validation loss, rise of the retained loss)], means over a row's runs at each validation; [] without data."""
    rises = zip(*([loss - run.retained[0] for loss in run.retained[1:]] for run in row.runs if run.retained))
    losses = (statistics.fmean(losses) for *_, losses in mean_curve(row.runs))
    return [(loss, statistics.fmean(rise)) for loss, rise in zip(losses, rises)]


def loss_of_all(rows: Iterable[Row]) -> float:
    """The lowest validation loss that all rows with a retained_curve reach, but for diverged ones; NaN without any."""
    curves = [retained_curve(row) for row in rows if math.isfinite(row.mean)]
    return max((min(loss for loss, _ in curve) for curve in curves if curve), default=math.nan)


def change_at(row: Row, loss: float) -> float:
    """The rise of the loss on --retain_data when a row's mean validation loss first was `loss`, interpolated linearly
    between validations; NaN if it passes `loss` between no two of them."""
    curve = retained_curve(row)
    for (above, before), (below, after) in zip(curve, curve[1:]):
        if above >= loss >= below:
            return before + (after - before) * (above - loss) / (above - below) if above > below else after
    return math.nan


def table(rows: Sequence[Row], seed: int, outcomes: Mapping[Cell, Outcome]) -> str:
    """Format the rows as a Markdown table. The loss at one rate for all is that of `seed`, the first one."""
    columns = list(columns_of(rows, seed, outcomes))
    lines = ["| " + " | ".join(head for head, _ in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def columns_of(
    rows: Sequence[Row], seed: int, outcomes: Mapping[Cell, Outcome]
) -> Iterator[tuple[str, Callable[[Row], str]]]:
    """Yield (head, function from a Row to its cell) for each column."""
    yield "method", lambda row: row.method
    yield "rank", lambda row: ", ".join(str(rank) for rank in row.size[:2] if rank)
    yield "trained parameters", lambda row: f"{row.size.trained:,}"
    yield "best rate", lambda row: f"{rate_of(row.rate):g}"
    yield "seeds", lambda row: str(len(row.losses))
    yield "validation loss", lambda row: number(row.mean, ".4f")
    yield "± (standard deviation)", lambda row: number(row.spread, ".4f")
    losses = {cell: outcome.loss for cell, outcome in outcomes.items()}
    shared = common_rate([row.method for row in rows], seed, losses)
    if shared is not None:
        head = f"loss at rate {rate_of(shared):g} for all"
        yield head, lambda row: number(losses[Cell(row.method, shared, seed)], ".4f")
    if all(row.retained for row in rows):
        yield "retained loss", lambda row: number(statistics.fmean(row.retained), ".4f")
        yield "change from the base", lambda row: number(statistics.fmean(row.changes), "+.4f")
        yield "± of the change", lambda row: number(spread(row.changes), ".4f")
        equal = loss_of_all(rows)
        if math.isfinite(equal):
            yield f"change at validation loss {equal:.4f}", lambda row: number(change_at(row, equal), "+.4f")
    reference = next((row.mean for row in rows if row.method == REFERENCE), None)
    if reference is not None and math.isfinite(reference):
        yield f"steps to {REFERENCE}'s loss", lambda row: str(steps_to(row, reference) or "")
    yield "ms a step", lambda row: number(statistics.median(run.step_ms for run in row.runs), ".0f")
    yield "peak memory, MB", lambda row: number(max(run.peak_mb for run in row.runs), ".0f")


def number(value: float, form: str) -> str:
    """Format a number of the table: "diverged" if it is infinite, "" if it is NaN, and so unknown."""
    if math.isnan(value):
        return ""
    return "diverged" if math.isinf(value) else format(value, form)


def lines_of_json(sizes: Mapping[str, Size], outcomes: Mapping[Cell, Outcome]) -> str:
    """A line of JSON for each run, with its curve; val_loss is null if the run diverged."""
    lines = []
    for cell, outcome in sorted(outcomes.items()):
        size = sizes[cell.method]
        measured = ("val_loss", outcome.loss), ("step_ms", outcome.step_ms), ("peak_mb", outcome.peak_mb)
        record = {
            "method": cell.method,
            "rank": size.rank,
            "mini_rank": size.mini_rank,
            "parameters": size.trained,
            "rate": rate_of(cell.rate),
            "seed": cell.seed,
            **{name: value if math.isfinite(value) else None for name, value in measured},
            "validations": outcome.validations,
            "retained": outcome.retained,
        }
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)
