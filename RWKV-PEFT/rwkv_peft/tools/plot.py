"""`rwkv-peft plot`: the loss curve of a run, or the curves of several runs, each of their values in a panel.

rwkv-peft plot out/bone loss.png
rwkv-peft plot out/bone out/lora compare.png
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.atomic import check_output
from ..cli.errors import UserError
from ..cli.parser import Parser, below_one
from ..cli.rules import NEEDS, Rule
from ..plots import (
    MANY,
    legend_text,
    look,
    metrics_of,
    new_figure,
    plain_axes,
    plot_loss,
    read_metrics,
    save_figure,
    series,
    smooth_drawn,
    unit_of,
    wants_logarithm,
)

ENDINGS = (".png", ".svg", ".pdf")
SEVERAL = "several runs"
RULES = (Rule("--x, --smooth", NEEDS, f"--panels, {SEVERAL}", "it is about panels", "add --panels for one run"),)


class Panel(NamedTuple):
    """name: the value's name in metrics.jsonl; label: the axis label, with the losses' {unit}; noisy: True if the value
    is smoothed; logarithm: True if the axis may be logarithmic."""

    name: str
    label: str
    noisy: bool = False
    logarithm: bool = False


PANELS = (
    Panel("loss", "loss (nats per {unit})", noisy=True, logarithm=True),
    Panel("val_loss", "validation loss (nats per {unit})", logarithm=True),
    Panel("retain_loss", "retained loss (nats per {unit})", logarithm=True),
    Panel("eval_score", "right answers (share)"),
    Panel("lr", "learning rate"),
    Panel("grad_norm", "gradient norm", noisy=True, logarithm=True),
    Panel("tokens_per_s", "tokens per second", noisy=True),
)


class PlottedRun(NamedTuple):
    """A run's label in the legend, and the records of its metrics.jsonl."""

    label: str
    records: list[dict[str, Any]]


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of folders' paths that tell them apart; if folders are equal, all are numbered."""
    parts = [folder.absolute().parts for folder in folders]
    longest = max(map(len, parts))
    found = ["/".join(part[-1:]) for part in parts]
    for length in range(2, longest + 1):
        if len(set(found)) == len(found):
            return found
        found = ["/".join(part[-length:]) for part in parts]
    return found if len(set(found)) == len(found) else [f"{label} ({n})" for n, label in enumerate(found, 1)]


def places(run: PlottedRun, by_tokens: bool) -> dict[int, float]:
    """{step, counted from 1: where it stands}: the step itself, or the millions of tokens up to it."""
    steps = [record["step"] + 1 for record in run.records]
    if not by_tokens:
        return dict(zip(steps, steps))
    counts = [record.get("tokens") or 0 for record in run.records]
    return {step: total / 1e6 for step, total in zip(steps, accumulate(counts))}


def plot_runs(runs: Sequence[PlottedRun], output: str | Path, weight: float = 0.9, by_tokens: bool = False) -> None:
    """Draw the panels that some run has values for, smoothed by `weight` (0: not); output's ending names the format."""
    panels = [panel for panel in PANELS if any(series(run.records, panel.name)[1] for run in runs)] or [PANELS[0]]
    unit = " or ".join(sorted({unit_of(run.records) for run in runs}))
    rows = 1 + -(-(len(panels) - 1) // 2)
    figure = new_figure(9, 1 + 2.6 * rows)
    grid = figure.add_gridspec(rows, 2)
    for number, panel in enumerate(panels):
        row, column = divmod(number + 1, 2)
        axes = figure.add_subplot(grid[0, :] if number == 0 else grid[row, column])
        draw(axes, panel, runs, weight, by_tokens)
        axes.set(ylabel=panel.label.format(unit=unit), xlabel="million tokens" if by_tokens else "step")
    handles, names = figure.axes[0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)), frameon=False)
    save_figure(figure, output)


def draw(axes: Any, panel: Panel, runs: Sequence[PlottedRun], weight: float, by_tokens: bool) -> None:
    """Draw one panel: a line for each run, with the raw values behind it if it is smoothed."""
    found = [series(run.records, panel.name) for run in runs]
    shown = [value for _, values in found for value in values]
    logarithm = panel.logarithm and wants_logarithm(shown)
    for number, (run, (steps, values)) in enumerate(zip(runs, found)):
        where = places(run, by_tokens)
        x = [where[step] for step in steps]
        style, many = look(number), len(values) >= MANY
        smoothed = panel.noisy and weight > 0 and many
        if smoothed:
            axes.plot(x, values, color=style["color"], alpha=0.2, linewidth=0.8)
        marker = None if many else "o"
        line = smooth_drawn(values, logarithm, weight) if smoothed else values
        axes.plot(x, line, linewidth=1.8, marker=marker, markersize=3.5, label=legend_text(run.label), **style)
    if logarithm:
        axes.set_yscale("log")
    if panel.name == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if panel.name in ("eval_score", "lr", "tokens_per_s") and shown:
        axes.set_ylim(bottom=0)
    plain_axes(axes)


def main(argv: list[str]) -> int:
    """Draw the runs; -> the exit code."""
    parser = Parser(
        prog="rwkv-peft plot",
        rules=RULES,
        facts=lambda args: {SEVERAL: len(args.paths or ()) > (1 if args.output else 2)},
        usage="rwkv-peft plot [-h] RUN [RUN ...] PICTURE [--panels] [--x {steps,tokens}] [--smooth SHARE]",
        description="Draw the loss curve of a run, as its loss.png, or the curves of several into one picture: losses, "
        "right answers, learning rate, gradient norm and speed, a panel each.",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        metavar="RUN … PICTURE",
        help="runs, by their folder or metrics.jsonl; then the .png, .svg or .pdf to write",
    )
    add("--output", metavar="PICTURE", help="the picture, if no PICTURE follows the runs")
    add("--panels", action="store_true", help="draw a single run in panels too")
    add("--x", choices=("steps", "tokens"), default="steps", help="x axis of the panels (default steps)")
    add(
        "--smooth",
        type=below_one,
        default=0.9,
        metavar="SHARE",
        help="share of the last mean in the next, in panels (default 0.9; 0: none)",
    )
    args = parser.parse_args(argv)
    runs = [*args.paths]
    output = Path(args.output or runs.pop())
    if not runs or any(Path(run).suffix in ENDINGS and not Path(run).is_dir() for run in runs):
        raise UserError("runs and one picture are due: rwkv-peft plot RUN loss.png")
    if output.suffix not in ENDINGS:
        raise UserError(f"{output} does not end in {', '.join(ENDINGS)}, which are drawn; give a name such as loss.png")
    check_output("the picture", output, [("a run", Path(run)) for run in runs])
    if args.panels or len(runs) > 1:
        files = list(map(metrics_of, runs))
        found = [
            PlottedRun(label, read_metrics(file)) for label, file in zip(labels([file.parent for file in files]), files)
        ]
        plot_runs(found, output, args.smooth, by_tokens=args.x == "tokens")
    else:
        plot_loss(metrics_of(runs[0]), output)
    print(f"wrote {output}")
    return 0
