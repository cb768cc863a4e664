"""Pictures of runs: their curves (loss.png), and the style that all pictures share."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .checkpoints.atomic import atomic_write
from .checkpoints.best import is_record
from .checkpoints.readable import require_readable
from .children import import_matplotlib
from .cli.errors import UserError, summarize
from .cli.names import METRICS, is_number
from .objectives import OBJECTIVES

# Okabe and Ito's colours, which people with any colour vision tell apart, without the yellow that is lost in print;
# line styles tell them apart in grey
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
LOSSES = MappingProxyType({"loss": "loss", "val_loss": "validation loss", "retain_loss": "retained loss"})
NATS = "nats per {unit}"  # the axis of losses
AXES = ("share", "margin (nats)", "reward", "tokens", "nats")  # of the figures of objectives
MANY = 20  # from so many values on, a noisy line is smoothed; fewer are drawn with markers
WEIGHT = 0.9  # of the last mean in the next

Series = tuple[list[int], list[float]]  # steps and values


class Curve(NamedTuple):
    """A value of metrics.jsonl: its name there, its label, the axis that it shares with values of its unit, and True if
    it is noisy, so that its mean is drawn too."""

    name: str
    label: str
    axis: str
    noisy: bool = False


class PlottedRun(NamedTuple):
    """A run's label in the legend, and the records of its metrics.jsonl."""

    label: str
    records: list[dict[str, Any]]


def new_figure(width: float, height: float, dpi: int = 150) -> Any:
    """An empty figure of a size in inches, which needs no display."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, output: str | Path) -> None:
    """Write a figure; the ending of `output`, which is overwritten, names the format."""
    with atomic_write(output) as temporary:
        figure.savefig(temporary, format=Path(output).suffix[1:])


def plain_axes(axes: Any) -> None:
    """Draw a light grid, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def look(position: int) -> dict[str, Any]:
    """The colour and style of the line at a position."""
    return {"color": LINE_COLOURS[position % len(LINE_COLOURS)], "linestyle": LINE_STYLES[position % len(LINE_STYLES)]}


def legend_text(name: str) -> str:
    """Escape a name for matplotlib, which would read text between two `$` as a formula."""
    return name.replace("$", r"\$")


def metrics_of(run: str | Path) -> Path:
    """The metrics.jsonl of a run, which is given by its folder or by that file itself."""
    return Path(run) / METRICS if Path(run).is_dir() else Path(run)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, one dict a step; a last line that is not whole JSON is left out.

    Raises UserError if the file is missing, or if a line is not a JSON object with a step.
    """
    path = require_readable(path, f"{path}: no such file; a run writes it into its --proj_dir")
    records, broken = [], None
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if broken is not None:
                raise broken
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # dropped if it is the last line
                broken = UserError(f"{path}, line {number}: not JSON ({summarize(error)}); delete that line")
                continue
            if not is_record(record):
                raise UserError(
                    f"{path}, line {number}: a metrics line is a JSON object with its step and samples, not "
                    f"{line[:40].decode(errors='replace')!r}"
                )
            records.append(record)
    return records


def series(records: Iterable[dict[str, Any]], name: str) -> Series:
    """([step], [value]) of the records that hold a number under `name`; steps are counted from 1, in records from 0."""
    pairs = [(record["step"] + 1, record[name]) for record in records if is_number(record.get(name))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: Iterable[float], weight: float = WEIGHT) -> list[float]:
    """The exponential moving average, without the bias of its start (Kingma and Ba 2015, section 3)."""
    result, mean, mass = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(mean / mass)
    return result


def wants_logarithm(values: Sequence[float]) -> bool:
    """Return True if a linear axis would show little but the largest values."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def of_files(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, its loss, its data file) of those names that are the loss of one of several data files."""
    for name in names:
        loss, _, file = name.partition("/")
        if file and loss in LOSSES:
            yield name, loss, file


def unit_of(records: Iterable[dict[str, Any]]) -> str:
    """The unit that a run's loss is a mean over: by the objective with the most figures in its records."""
    names = {name for record in records for name in record}
    return max(OBJECTIVES.values(), key=lambda one: sum(figure.name in names for figure in one.figures)).unit


def curves_of(records: Sequence[dict[str, Any]]) -> list[Curve]:
    """The curves that some records have a number for, losses first."""
    names = dict.fromkeys(name for record in records for name in record)
    figures = [figure for objective in OBJECTIVES.values() for figure in objective.figures if figure.axis in AXES]
    found = [
        *(Curve(name, label, NATS, name == "loss") for name, label in LOSSES.items()),
        *(Curve(name, f"{LOSSES[loss]} of {file}", NATS, loss == "loss") for name, loss, file in of_files(names)),
        Curve("lr", "learning rate", "learning rate"),
        Curve("grad_norm", "gradient norm", "gradient norm", noisy=True),
        Curve("tokens_per_s", "tokens per second", "tokens per second", noisy=True),
        Curve("eval_score", "right answers", "share"),
        *(Curve(figure.name, figure.label, figure.axis, noisy=True) for figure in dict.fromkeys(figures)),
    ]
    return [curve for curve in found if series(records, curve.name)[0]]


def plot_loss(metrics_jsonl: str | Path, output: str | Path) -> None:
    """Draw the curves of one run's metrics.jsonl."""
    plot_runs([PlottedRun("", read_metrics(metrics_jsonl))], output)


def plot_runs(runs: Sequence[PlottedRun], output: str | Path, by_tokens: bool = False) -> None:
    """Draw runs, the loss in the first panel: of one run the curves of an axis share a panel, of several runs each
    curve has its own, with a line for each run. x is the step, or the millions of tokens up to it."""
    panels: dict[str, list[Curve]] = {}
    for curve in curves_of([record for run in runs for record in run.records]) or [Curve("loss", "loss", NATS)]:
        panels.setdefault(curve.axis if len(runs) == 1 else curve.label, []).append(curve)
    rows = 1 + -(-(len(panels) - 1) // 2)
    figure = new_figure(9, 1.8 + 2.4 * rows, dpi=120)
    grid = figure.add_gridspec(rows, 2, height_ratios=[1.5, *[1] * (rows - 1)])
    unit = " or ".join(sorted({unit_of(run.records) for run in runs}))
    for place, curves in enumerate(panels.values(), start=1):
        axes = figure.add_subplot(grid[0, :] if place == 1 else grid[place // 2, place % 2])
        draw_panel(axes, curves, runs, by_tokens)
        axis, label = curves[0].axis.format(unit=unit), curves[0].label
        named = axis if axis.startswith(label) else f"{label} ({axis})" if len(runs) > 1 or len(curves) == 1 else axis
        axes.set(ylabel=legend_text(named), xlabel="million tokens" if by_tokens else "step")
        if len(runs) == 1 and len(curves) > 1:
            axes.legend(frameon=False, fontsize="small")
    if len(runs) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    save_figure(figure, output)


def draw_panel(axes: Any, curves: Sequence[Curve], runs: Sequence[PlottedRun], by_tokens: bool) -> None:
    """Draw a line for each curve and run, with the raw values behind the mean of a noisy one."""
    lines = [(curve, run, series(run.records, curve.name)) for curve in curves for run in runs]
    shown = [value for *_, (_, values) in lines for value in values]
    logarithm = curves[0].axis in (NATS, "gradient norm") and wants_logarithm(shown)
    for number, (curve, run, (steps, values)) in enumerate(lines):
        where = tokens_at(run.records) if by_tokens else dict(zip(steps, steps))
        x, style, many = [where[step] for step in steps], look(number), len(values) >= MANY
        if many and curve.noisy:
            axes.plot(x, values, color=style["color"], alpha=0.25, linewidth=0.8)
            # on a logarithmic axis a mean of the values would stay far above them as they fall
            values = [math.exp(mean) for mean in smooth(map(math.log, values))] if logarithm else smooth(values)
        label = legend_text(run.label if len(runs) > 1 else curve.label)
        axes.plot(x, values, linewidth=1.8, marker=None if many else "o", markersize=3.5, label=label, **style)
    if not shown:
        axes.text(0.5, 0.5, "no step recorded", transform=axes.transAxes, ha="center", va="center", color="gray")
    elif logarithm:
        axes.set_yscale("log")
    elif curves[0].axis in ("share", "learning rate", "tokens per second"):
        axes.set_ylim(bottom=0)
    plain_axes(axes)


def tokens_at(records: Sequence[dict[str, Any]]) -> dict[int, float]:
    """{step, counted from 1: the millions of tokens up to it}."""
    totals = accumulate(record["tokens"] if is_number(record.get("tokens")) else 0 for record in records)
    return {record["step"] + 1: total / 1e6 for record, total in zip(records, totals)}
