"""The results of a comparison: rows of one table, lines of JSON, and figures."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...plots import look, new_figure, plain_axes, save_figure
from .plan import Cell, Size, best_rate, rate_of
from .runs import Outcome

REFERENCE = "lora"  # the table has the steps that each method takes to its final loss
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "d")
FORMATS = ("png", "svg")


class MethodRow(NamedTuple):
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
        """The rise of each above the loss before the first step."""
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
) -> list[MethodRow]:
    """A MethodRow for each method with a complete run of the first seed, the lowest mean loss first."""
    losses = {cell: outcome.loss for cell, outcome in outcomes.items()}
    rows = []
    for method in methods:
        rate = best_rate(method, seeds[0], losses)
        if rate is None:
            continue
        runs = tuple(outcomes[cell] for seed in seeds if (cell := Cell(method, rate, seed)) in outcomes)
        rows.append(MethodRow(method, sizes[method], rate, tuple(run.loss for run in runs), runs))
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


def steps_to(row: MethodRow, loss: float) -> int | None:
    """The steps done at the first validation at which a row's mean loss is at most `loss`; None if it never is."""
    return next((done for done, _, losses in mean_curve(row.runs) if statistics.fmean(losses) <= loss), None)


def retained_curve(row: MethodRow) -> list[tuple[float, float]]:
    """[(validation loss, rise of the retained loss)], means over a row's runs at each validation; [] without data."""
    rises = zip(*([loss - run.retained[0] for loss in run.retained[1:]] for run in row.runs if run.retained))
    losses = (statistics.fmean(losses) for *_, losses in mean_curve(row.runs))
    return [(loss, statistics.fmean(rise)) for loss, rise in zip(losses, rises)]


def loss_of_all(rows: Iterable[MethodRow]) -> float:
    """The lowest validation loss that all rows with a retained_curve reach, but for diverged ones; NaN without any."""
    curves = [retained_curve(row) for row in rows if math.isfinite(row.mean)]
    return max((min(loss for loss, _ in curve) for curve in curves if curve), default=math.nan)


def change_at(row: MethodRow, loss: float) -> float:
    """The rise of the loss on --retain_data when a row's mean validation loss first was `loss`, interpolated linearly
    between validations; NaN if it passes `loss` between no two of them."""
    curve = retained_curve(row)
    for (above, before), (below, after) in zip(curve, curve[1:]):
        if above >= loss >= below:
            return before + (after - before) * (above - loss) / (above - below) if above > below else after
    return math.nan


def table(rows: Sequence[MethodRow], seed: int, outcomes: Mapping[Cell, Outcome]) -> str:
    """Format the rows as a Markdown table. The loss at one rate for all is `seed`'s, the first one's."""
    columns = list(columns_of(rows, seed, outcomes))
    lines = ["| " + " | ".join(head for head, _ in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def columns_of(
    rows: Sequence[MethodRow], seed: int, outcomes: Mapping[Cell, Outcome]
) -> Iterator[tuple[str, Callable[[MethodRow], str]]]:
    """Yield (head, function from a MethodRow to its cell) for each column."""
    yield "method", lambda row: row.method
    yield "rank", lambda row: ", ".join(str(rank) for rank in row.size[:2] if rank)
    yield "trained parameters", lambda row: f"{row.size.trained:,}"
    yield "best rate", lambda row: f"{rate_of(row.rate):g}"
    yield "seeds", lambda row: str(len(row.losses))
    yield "validation loss", lambda row: cell_text(row.mean, ".4f")
    yield "± (standard deviation)", lambda row: cell_text(row.spread, ".4f")
    losses = {cell: outcome.loss for cell, outcome in outcomes.items()}
    shared = common_rate([row.method for row in rows], seed, losses)
    if shared is not None:
        head = f"loss at rate {rate_of(shared):g} for all"
        yield head, lambda row: cell_text(losses[Cell(row.method, shared, seed)], ".4f")
    if all(row.retained for row in rows):
        yield "retained loss", lambda row: cell_text(statistics.fmean(row.retained), ".4f")
        yield "change from the base", lambda row: cell_text(statistics.fmean(row.changes), "+.4f")
        yield "± of the change", lambda row: cell_text(spread(row.changes), ".4f")
        equal = loss_of_all(rows)
        if math.isfinite(equal):
            yield f"change at validation loss {equal:.4f}", lambda row: cell_text(change_at(row, equal), "+.4f")
    reference = next((row.mean for row in rows if row.method == REFERENCE), None)
    if reference is not None and math.isfinite(reference):
        yield f"steps to {REFERENCE}'s loss", lambda row: str(steps_to(row, reference) or "")
    yield "ms a step", lambda row: cell_text(statistics.median(run.step_ms for run in row.runs), ".0f")
    yield "peak memory, MB", lambda row: cell_text(max(run.peak_mb for run in row.runs), ".0f")


def cell_text(value: float, form: str) -> str:
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


def draw_figures(
    folder: Path, rows: Sequence[MethodRow], methods: Sequence[str], seed: int, runs: Mapping[Cell, Outcome]
) -> None:
    """Write the figures steps, time and rates (.png, .svg) into a folder, and retained if --retain_data was measured. A
    method's place in methods gives its colour, line and marker."""
    looks = {
        method: {**look(position), "marker": MARKERS[position % len(MARKERS)], "markersize": 4, "linewidth": 1.5}
        for position, method in enumerate(methods)
    }
    several = max(len(row.runs) for row in rows) > 1
    what = "validation loss (nats per token)" + "\nmean, lowest and highest of the seeds" * several
    for place, (name, xlabel) in enumerate((("steps", "optimizer steps"), ("time", "seconds of training"))):
        figure, axes = with_axes(xlabel, what)
        for row in rows:
            band(axes, row, looks[row.method], place)
        save(figure, axes, folder, name)
    figure, axes = with_axes("learning rate", "final validation loss (nats per token)")
    axes.set_xscale("log")
    tried = sorted({rate_of(cell.rate) for cell in runs if cell.seed == seed})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xticks([], minor=True)
    for row in rows:
        swept = sorted((rate_of(cell.rate), run.loss) for cell, run in runs.items() if cell[::2] == (row.method, seed))
        points = [(rate, loss) for rate, loss in swept if math.isfinite(loss)]
        axes.plot(*zip(*points), label=row.method, **looks[row.method]) if points else None
        for rate in (rate for rate, loss in swept if not math.isfinite(loss)):  # a cross at the upper edge
            axes.plot([rate], [0.98], "x", color=looks[row.method]["color"], transform=axes.get_xaxis_transform())
    save(figure, axes, folder, "rates")
    if any(row.retained for row in rows):
        figure, axes = with_axes(
            "final validation loss (nats per token)", "final rise of the loss on --retain_data\na point a learning rate"
        )
        axes.invert_xaxis()  # runs that learned more stand further to the right
        for row in rows:
            swept_runs = [runs[cell] for cell in sorted(runs) if cell[::2] == (row.method, seed)]
            ends = [run for run in swept_runs if run.retained and math.isfinite(run.loss)]
            points = [(run.loss, run.retained[-1] - run.retained[0]) for run in ends]
            axes.plot(*zip(*points), label=row.method, **looks[row.method]) if points else None
        save(figure, axes, folder, "retained")


def band(axes: Any, row: MethodRow, style: dict[str, Any], place: int) -> None:
    """Draw the mean over the seeds, and a band from the lowest to the highest, over steps (0) or seconds (1)."""
    curve = mean_curve(row.runs)
    x = [point[place] for point in curve]
    mean, low, high = ([of(losses) for *_, losses in curve] for of in (statistics.fmean, min, max))
    axes.plot(x, mean, label=f"{row.method}, rate {rate_of(row.rate):g}", **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15)


def with_axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    """A new figure, and its axes."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    plain_axes(axes)
    return figure, axes


def save(figure: Any, axes: Any, folder: Path, name: str) -> None:
    """Add the legend and write NAME.png and NAME.svg."""
    axes.legend(frameon=False)
    for form in FORMATS:
        save_figure(figure, folder / f"{name}.{form}")
