"""The figures of a comparison, a line a method: loss against steps, against time and against the learning rate, and the
rise of the loss on --retain_data against the validation loss, a point a learning rate."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...plots import look, new_figure, plain_axes, save_figure
from .outcomes import Outcome
from .plan import Cell, rate_of
from .report import Row, mean_curve

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "d")
FORMATS = ("png", "svg")


def draw(folder: Path, rows: Sequence[Row], methods: Sequence[str], seed: int, runs: Mapping[Cell, Outcome]) -> None:
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


def band(axes: Any, row: Row, style: dict[str, Any], place: int) -> None:
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
