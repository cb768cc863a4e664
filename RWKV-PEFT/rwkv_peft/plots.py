"""The picture of a run, its loss curve, which train.py writes beside its metrics; the style that all pictures share."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .checkpoints.atomic import atomic_write
from .checkpoints.best import LONGEST, is_record
from .checkpoints.readable import require_readable
from .children import import_matplotlib
from .cli.errors import UserError, told
from .cli.names import METRICS, is_number
from .objectives import OBJECTIVES

SHARES = ("acc", "acc_norm", "exact_match")  # lm_eval's metrics that are shares of right answers
COLORS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "black", "gold")  # below the loss
HELD_OUT = (("validation loss", "val_loss", "tab:orange"), ("retained loss", "retain_loss", "tab:green"))
LOSSES = MappingProxyType({"loss": "loss"} | {name: label for label, name, _ in HELD_OUT})  # a record's, in words
DRAWN = len(COLORS) - 4  # the most tasks of lm_eval, because right answers and an objective's figures need colours too
# Okabe and Ito's colours, which people with any colour vision tell apart, without the yellow that is lost in print;
# line styles tell them apart in grey
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
AXES = ("share", "margin (nats)", "reward", "tokens", "nats")  # of the figures of objectives
MANY = 20  # from so many values on, a noisy line is smoothed; fewer are drawn with markers

Series = tuple[list[int], list[float]]  # steps and values


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
    """The metrics.jsonl of a run, which is given by its folder or by that file itself. Raises UserError if a folder's
    is not a plain file, because reading a pipe or a device may never end."""
    if not Path(run).is_dir():
        return Path(run)
    path = Path(run) / METRICS
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file, and a run writes one; move it away")
    return path


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, one dict a step; a last line that is not whole JSON is left out.

    Raises UserError if the file is missing, or if a line is not a JSON object with a step.
    """
    path = require_readable(path, f"{path}: no such file; a run writes it into its --proj_dir")
    records, broken = [], None
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), start=1):
            if broken is not None:
                raise broken
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # of the last line it is told by nobody
                broken = UserError(f"{path}, line {number}: not JSON ({told(error)}); delete that line")
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


def smooth(values: Iterable[float], weight: float = 0.9) -> list[float]:
    """The exponential moving average, without the bias of its start (Kingma and Ba 2015, section 3)."""
    result, mean, mass = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(mean / mass)
    return result


def smooth_drawn(values: Sequence[float], logarithm: bool, weight: float = 0.9) -> list[float]:
    """Smooth values as their axis shows them: on a logarithmic axis their logarithms, because a mean of the values
    would stay far above them as they fall."""
    if not logarithm:
        return smooth(values, weight)
    return [math.exp(mean) for mean in smooth(map(math.log, values), weight)]


def wants_logarithm(values: Sequence[float]) -> bool:
    """Return whether a linear axis would show little but the largest values."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def drawn_below(records: Sequence[dict[str, Any]]) -> dict[str, Mapping[str, Series]]:
    """{axis: {label: its series}} of the records' figures besides losses and rates: the shares of right answers (of the
    pairs that a run learns from, its own questions, and the first few tasks of lm_eval), the margins of pairs, and the
    rewards, lengths and entropy of drawn answers."""
    names = dict.fromkeys(name for record in records for name in record if name.startswith("lm_eval/"))
    tasks = [name for name in names if name.split("/")[2:3] and name.split("/")[2] in SHARES]
    shown = {axis: drawn_figures(axis) for axis in AXES}
    shown["share"] = {"right answers": "eval_score"} | shown["share"]
    shown["share"] |= {legend_text(name.removeprefix("lm_eval/")): name for name in tasks[:DRAWN]}
    found = {
        axis: {label: points for label, name in names.items() if (points := series(records, name))[0]}
        for axis, names in shown.items()
    }
    return {axis: drawn for axis, drawn in found.items() if drawn}


def drawn_figures(axis: str) -> dict[str, str]:
    """{label: name} of the figures of objectives that are drawn at an axis."""
    figures = (figure for objective in OBJECTIVES.values() for figure in objective.figures)
    return {figure.label: figure.name for figure in figures if figure.axis == axis}


def of_files(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, its loss, its data file) of those names that are the loss of one of several data files."""
    for name in names:
        loss, _, file = name.partition("/")
        if file and loss in LOSSES:
            yield name, loss, file


def by_source(
    records: Iterable[dict[str, Any]], name: str, label: str, color: str
) -> list[tuple[str, dict[str, Any], list[int], list[float]]]:
    """[(label, look, steps, losses)] of several data files, the records' NAME/FILE: in one colour, with lines of
    different styles."""
    names = dict.fromkeys(found for record in records for found, of, _ in of_files(record) if of == name)
    return [
        (
            legend_text(f"{label} of {found.partition('/')[2]}"),
            {"color": color, "linestyle": style},
            *series(records, found),
        )
        for found, style in zip(names, cycle(LINE_STYLES[1:]))
    ]


def unit_of(records: Iterable[dict[str, Any]]) -> str:
    """The unit that a run's loss is a mean over: by the objective with the most figures in its records."""
    names = {name for record in records for name in record}
    return max(OBJECTIVES.values(), key=lambda one: sum(figure.name in names for figure in one.figures)).unit


def plot_loss(metrics_jsonl: str | Path, output: str | Path) -> None:
    """Draw a run's metrics.jsonl: loss (raw and smoothed), learning rate, and validation loss and retained loss if they
    were measured, over the steps; below them drawn_below's series, if there are any. A run without a step is drawn
    too."""
    records = read_metrics(metrics_jsonl)
    steps, losses = series(records, "loss")
    below = drawn_below(records)
    figure = new_figure(8, 4.5 + 1.5 * len(below), dpi=120)
    grid = figure.subplots(1 + len(below), sharex=True, squeeze=False, height_ratios=[3] + [1] * len(below))
    axes, *lower = grid[:, 0]
    axes.set(ylabel=f"loss (nats per {unit_of(records)})")
    colors = iter(COLORS)
    for panel, (label, drawn) in zip(lower, below.items()):
        draw_below(panel, label, drawn, colors)
    figure.axes[-1].set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    if not losses:
        axes.text(0.5, 0.5, "no step recorded", transform=axes.transAxes, ha="center", va="center", color="gray")
    held_out = [(label, {"color": color}, *series(records, name)) for label, name, color in HELD_OUT]
    for label, name, color in HELD_OUT:
        held_out += by_source(records, name, label, color)
    sources = by_source(records, "loss", "loss", "tab:blue")
    shown = losses + [value for *_, values in held_out + sources for value in values]
    logarithm, few = wants_logarithm(shown), len(losses) < MANY
    axes.plot(
        steps,
        losses,
        color="tab:blue",
        alpha=1 if few else 0.3,
        linewidth=1,
        marker="o" if few else None,
        markersize=3,
        label="loss",
    )
    if not few:
        axes.plot(steps, smooth_drawn(losses, logarithm), color="tab:blue", linewidth=2, label="loss, smoothed")
    for label, style, at, values in held_out:
        if values:
            axes.plot(at, values, linewidth=2, marker="o", markersize=3, label=label, **style)
    for label, style, at, values in sources:
        line = values if few else smooth_drawn(values, logarithm)
        axes.plot(at, line, linewidth=1, marker="o" if few else None, markersize=3, label=label, **style)
    for start in series(records, "retain_start")[1]:
        axes.axhline(start, color=HELD_OUT[1][2], linewidth=1, linestyle=":")
    if logarithm:
        axes.set_yscale("log")
    lr_steps, rates = series(records, "lr")
    if rates:
        right = axes.twinx()
        right.plot(lr_steps, rates, color="gray", linewidth=1, linestyle="--", label="learning rate")
        right.set_ylabel("learning rate", color="gray")
        right.set_ylim(bottom=0)
        right.tick_params(axis="y", colors="gray")
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        right.spines["top"].set_visible(False)
    if shown:
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, output)


def draw_below(axes: Any, label: str, drawn: Mapping[str, Series], colors: Iterator[str]) -> None:
    """Draw a panel of a few series: one of MANY values is smoothed, others are drawn with markers."""
    for name, (steps, values) in drawn.items():
        many = len(values) >= MANY
        marks: dict[str, Any] = {} if many else dict(marker="o", markersize=3)
        axes.plot(steps, smooth(values) if many else values, color=next(colors), linewidth=2, label=name, **marks)
    axes.set(ylabel=label, ylim=(0, 1.05) if label == "share" else None)
    plain_axes(axes)
