"""The results of a comparison: one table, a line of JSON for each run, and one picture."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...plots import look, new_figure, plain_axes, save_figure
from .runs import Outcome
from .sweep import Cell, Size, best_rate, rate_of


class MethodRow(NamedTuple):
    """A method at its best rate, with the Outcomes of all complete seeds."""

    method: str
    size: Size
    rate: int
    runs: tuple[Outcome, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(run.loss for run in self.runs)

    @property
    def retained(self) -> list[tuple[float, float]]:
        """(the final loss on --retain_data, its rise) of each run that measured it, infinite if it diverged."""
        ends = [(run, run.retained[-1] if math.isfinite(run.loss) else math.inf) for run in self.runs if run.retained]
        return [(end, end - run.retained[0]) for run, end in ends]

    @property
    def curve(self) -> list[tuple[int, list[float]]]:
        """[(steps done, losses)] at each validation that all runs have."""
        return [(points[0][0], [loss for _, loss in points]) for points in zip(*(run.validations for run in self.runs))]


def rows_of(
    methods: Sequence[str], seeds: Sequence[int], sizes: Mapping[str, Size], outcomes: Mapping[Cell, Outcome]
) -> list[MethodRow]:
    """A MethodRow for each method with a complete run of the first seed, the lowest mean loss first."""
    losses = {cell: outcome.loss for cell, outcome in outcomes.items()}
    rows = []
    for method in methods:
        rate = best_rate(method, seeds[0], losses)
        if rate is not None:
            runs = tuple(outcomes[cell] for seed in seeds if (cell := Cell(method, rate, seed)) in outcomes)
            rows.append(MethodRow(method, sizes[method], rate, runs))
    return sorted(rows, key=lambda row: statistics.fmean(row.losses))


def table(rows: Sequence[MethodRow]) -> str:
    """Format the rows as a Markdown table; losses on --retain_data are shown if all methods have them."""
    lines = list[dict[str, str]]()
    for row in rows:
        cells = {
            "method": row.method,
            "rank": ", ".join(str(rank) for rank in row.size[:2] if rank),
            "trained parameters": f"{row.size.trained:,}",
            "best rate": f"{rate_of(row.rate):g}",
            "seeds": str(len(row.runs)),
            "validation loss": cell_text(statistics.fmean(row.losses), ".4f"),
            "± (standard deviation)": cell_text(spread(row.losses), ".4f"),
        }
        if all(each.retained for each in rows):
            ends, rises = zip(*row.retained)
            cells["retained loss"] = cell_text(statistics.fmean(ends), ".4f")
            cells["change from the base"] = cell_text(statistics.fmean(rises), "+.4f")
        cells["ms a step"] = cell_text(statistics.median(run.step_ms for run in row.runs), ".0f")
        cells["peak memory, MB"] = cell_text(max(run.peak_mb for run in row.runs), ".0f")
        lines.append(cells)
    heads = [*lines[0]]
    rules = "|---" * len(heads) + "|"
    return "\n".join([line_of(heads), rules, *(line_of([*cells.values()]) for cells in lines)]) + "\n"


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> float:
    """The standard deviation of the finite values, NaN if there are fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.stdev(finite) if len(finite) > 1 else math.nan


def cell_text(value: float, form: str) -> str:
    """Format a number of the table: "diverged" if it is infinite, "" if it is NaN, and so unknown."""
    if math.isnan(value):
        return ""
    return "diverged" if math.isinf(value) else format(value, form)


def lines_of_json(sizes: Mapping[str, Size], outcomes: Mapping[Cell, Outcome]) -> str:
    """A line of JSON for each run, with its curve; a number is null if it is not finite, as after divergence."""
    lines = []
    for cell, outcome in sorted(outcomes.items()):
        size = sizes[cell.method]
        record: dict[str, Any] = {
            "method": cell.method,
            "rank": size.rank,
            "mini_rank": size.mini_rank,
            "parameters": size.trained,
            "rate": rate_of(cell.rate),
            "seed": cell.seed,
        }
        for name in ("loss", "step_ms", "peak_mb"):
            value = getattr(outcome, name)
            record["val_loss" if name == "loss" else name] = value if math.isfinite(value) else None
        lines.append(json.dumps(record | {"validations": outcome.validations, "retained": outcome.retained}))
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: Sequence[MethodRow], seed: int, outcomes: Mapping[Cell, Outcome]) -> None:
    """Draw the validation loss over the steps, the mean of the seeds in a band from the lowest to the highest, and
    beside it the final loss with the first seed over the learning rate."""
    figure = new_figure(12, 4.5)
    over_steps, over_rates = figure.subplots(1, 2)
    for number, row in enumerate(rows):
        style = look(number)
        steps = [done for done, _ in row.curve]
        mean, low, high = ([of(losses) for _, losses in row.curve] for of in (statistics.fmean, min, max))
        over_steps.plot(steps, mean, label=f"{row.method}, rate {rate_of(row.rate):g}", **style)
        over_steps.fill_between(steps, low, high, color=style["color"], alpha=0.15)
        swept = [run for cell, run in sorted(outcomes.items()) if cell[::2] == (row.method, seed)]
        points = [(rate_of(run.cell.rate), run.loss) for run in swept if math.isfinite(run.loss)]
        over_rates.plot([rate for rate, _ in points], [loss for _, loss in points], marker="o", **style)
    over_steps.set(xlabel="optimizer steps", ylabel="validation loss (nats per token)")
    over_rates.set(xlabel="learning rate", ylabel="final validation loss (nats per token)", xscale="log")
    for axes in (over_steps, over_rates):
        plain_axes(axes)
    over_steps.legend(frameon=False)
    save_figure(figure, path)
