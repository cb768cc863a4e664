"""How a run ends: its settings beside its files, the loss curve, the card, and the report that is printed."""

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.atomic import write_text
from ..checkpoints.best import BEST, SINCE, HeldOut, labelled, take
from ..cli.errors import UserError
from ..cli.names import CARD, METRICS, PICTURE, RUN
from ..cli.parser import counted
from ..data.recorded import ENTRY, OPENING
from ..data.report import opening_of
from ..plots import plot_loss, read_metrics
from ..release.card import card_of, write_card
from .inputs import VALIDATION
from .learned import UNKNOWN, aim_of, by_source, notes_on, on_held_out, quarters_of
from .loop import StopRequest
from .prepared import TrainingRun
from .saving.products import newest_name


def write_run_config(run: TrainingRun) -> None:
    """Write the run's settings, steps, vocabulary and the opening of an answer in its data to its config.json."""
    vocabulary = run.samples.vocabulary
    entries: dict[str, Any] = {OPENING: opening_of(run.samples.dataset, vocabulary), "steps": run.plan.total_steps}
    entries[SINCE] = run.inputs.identity[SINCE]
    if vocabulary is not None:
        entries[ENTRY] = vocabulary._asdict()
    write_text(run.folder / RUN, json.dumps(asdict(run.config) | entries, indent=2, sort_keys=True) + "\n")


def exit_code(run: TrainingRun, done: int, stop: StopRequest) -> int:
    """128 + the signal's number for a run that a signal ended after `done` steps, before its last; 1 if it is over and
    each part of it loses more than --forget_at_most; else 0.

    The signal may have come to another rank alone."""
    if done < run.plan.total_steps and not run.exhausted:
        return 128 + (stop.signal or signal.SIGTERM)
    return int(run.bound is not None and run.bound.fails)


def report_end(run: TrainingRun, done: int, stop: StopRequest, say: Callable[..., object]) -> tuple[int, str]:
    """Draw the loss curve and write the card of a run; returns (the exit code, how it ended in words)."""
    records, held_out = list[dict[str, Any]](), HeldOut(None, [])
    name, sign = aim_of(run.config)
    try:
        records = read_metrics(run.folder / METRICS)
        held_out = HeldOut.of(records, run.inputs.identity[SINCE])
        plot_loss(run.folder / METRICS, run.folder / PICTURE)
    except UserError as error:  # the trained tensors are saved, so go on
        say(f"note: {error}; --resume auto draws it again", file=sys.stderr)
    # A run that was stopped says how to go on. Figures of half a run would mislead.
    if (code := exit_code(run, done, stop)) > 128:
        return code, (
            f"stopped after {done:,} of {counted(run.plan.total_steps, 'step')}, saved in {run.folder}; "
            "the same command with --resume goes on"
        )
    sources, answers = list(by_source(records)), [] if run.rows is None else list(run.rows.lines())
    report = [*under("sources", sources), *under("answers", answers), *notes_on(run.config, records, run.rows)]
    figures = [("steps", f"{run.plan.total_steps:,}")]
    if records:
        first, last = quarters_of(records, name)
        figures.append((name, f"{first:.4f} to {last:.4f}, the first and last quarter's mean"))
    figures += [("sources", line) for line in sources]
    figures += [("answers", line) for line in answers if not line.startswith(" ")]
    if held_out.losses:
        best = labelled(newest_of(run), BEST)
        course, *notes = on_held_out(held_out, name, sign, best if run.bound is None else None)
        patience = counted(run.config.train.early_stop, "validation")
        early = f"; stopped after {patience} without a lower one" if run.exhausted else ""
        figures.append(("validation", course))
        report += [f"validation  {course}, {best}{early}", *notes]
    elif run.config.data.of_answers and VALIDATION not in run.inputs.measured:
        report.append(f"validation  {UNKNOWN}")
    if run.bound is not None:
        *_, lost = lines = list(run.bound.lines())
        figures.append(("forgetting", lost))
        report += under("forgets", lines)
    # Last: it lists the files that are there by now.
    use = write_run_card(run, figures, say)
    report.append(f"finished  {newest_of(run)}, {run.folder / PICTURE}, {run.folder / METRICS}{use}")
    return code, "\n".join(report)


def newest_of(run: TrainingRun) -> Path:
    """The file of a run's newest trained tensors."""
    return run.folder / newest_name(run.config.adapter)


def under(label: str, lines: Iterable[str]) -> Iterator[str]:
    """Yield lines in a column, the first behind the label."""
    for number, line in enumerate(lines):
        yield f"{'' if number else label:<10}{line}"


def write_run_card(run: TrainingRun, figures: Sequence[tuple[str, str]], say: Callable[..., object]) -> str:
    """Write the card of a run's folder -> a clause that names it, "" if it was not written."""
    card, chosen = run.folder / CARD, take(run.folder, newest_of(run).name).path
    try:
        if write_card(run.folder, card_of(run.folder.resolve().name, [chosen], figures)):
            return f"; {card} says how to use it"
        say(f"note: {card} is yours and stays; the run's own card is not written", file=sys.stderr)
    except UserError as error:  # the tensors that it describes are saved
        say(f"note: no card was written: {error}", file=sys.stderr)
    return ""
