"""Run the training loop of a prepared run, Lightning's Trainer over DeepSpeed, and report how it ended."""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...checkpoints.atomic import write_text
from ...checkpoints.best import BEST, SINCE, HeldOut, labelled, take
from ...children import import_matplotlib
from ...cli.errors import Ended, UserError, keeping_handlers
from ...cli.names import CARD, METRICS, PICTURE, RUN
from ...cli.parser import counted
from ...data.recorded import ENTRY, OPENING
from ...data.report import opening_of
from ...memory import keep_freed_memory
from ...plots import plot_loss, read_metrics, series
from ...release.push import card_of, write_card
from ..inputs import VALIDATION
from ..learned import UNKNOWN, aim_of, by_source, fall_of, held_out_line, notes_on, overfitted
from ..saving.checkpoints import DIVERGED, find_checkpoint, telling_refusals
from ..step.compiling import compiled
from .prepared import Prepared

if TYPE_CHECKING:
    from ..step.lit import Lit


def quiet() -> None:
    """Silence the libraries' banners and tips, which are not about this run."""
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "DeepSpeed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*`IterableDataset`.*",
        ".*overridden `transfer_batch_to_device`.*",
        ".*isinstance.treespec.*",
        ".*barrier.*device under current context.*",
        ".*torch.distributed.*deprecated.*",
    ):
        warnings.filterwarnings("ignore", text)


def fit(run: Prepared, say: Callable[..., object]) -> tuple[int, str]:
    """Run Lightning's Trainer over the plan; returns (the exit code, how it ended in words)."""
    if run.accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would use a GPU if there is one
        keep_freed_memory()
    import_matplotlib()  # which Lightning imports
    from ..saving.loggers import make_loggers
    from ..step.lit import Diverged
    from .trainer import RunBatches, make_lit, make_trainer

    quiet()
    data, train = run.config.data, run.config.train
    try:
        compiling = compiled(run.model, data) if train.compile else nullcontext()
        with telling_refusals(run.folder), compiling:
            loggers = []
            if run.leads:
                write_run_config(run)
                loggers = make_loggers(run.config, run.folder, run.plan.first_step)
            lit = make_lit(run)
            trainer = make_trainer(run, loggers, say)
            with keeping_handlers():
                trainer.fit(lit, RunBatches(run))
    except Diverged as error:
        last = find_checkpoint(run.folder)
        say(
            f"error: {error}; {DIVERGED}. "
            + (f"The last good checkpoint is {last}" if last else "No checkpoint had been saved yet")
            + "; try a lower --lr_init, or --precision fp32",
            file=sys.stderr,
        )
        return 1, ""
    except (Exception, SystemExit) as error:
        # Lightning ends with another exception if a signal meets it between steps, or while it closes a log
        if isinstance(error.__context__, KeyboardInterrupt | Ended):
            raise error.__context__ from None
        raise
    return ended(run, lit, say) if run.leads else (stopped(run, lit), "")


def write_run_config(run: Prepared) -> None:
    """Write the run's settings, steps, vocabulary and the opening of an answer in its data to its config.json."""
    vocabulary = run.samples.vocabulary
    entries: dict[str, Any] = {OPENING: opening_of(run.samples.dataset, vocabulary), "steps": run.plan.total_steps}
    entries[SINCE] = run.inputs.identity[SINCE]
    if vocabulary is not None:
        entries[ENTRY] = vocabulary._asdict()
    write_text(run.folder / RUN, json.dumps(asdict(run.config) | entries, indent=2, sort_keys=True) + "\n")


def stopped(run: Prepared, lit: "Lit") -> int:
    """128 + the signal's number for a run that a signal ended before its last step, else 0."""
    early = lit.stopping and lit.step < run.plan.total_steps and not run.exhausted
    return 128 + (lit.stop_requested or signal.SIGTERM) if early else 0


def ended(run: Prepared, lit: "Lit", say: Callable[..., object]) -> tuple[int, str]:
    """Draw the loss curve and write the card of a run; returns (the exit code, how it ended in words)."""
    records, losses, sources, held_out = list[dict[str, Any]](), list[float](), list[str](), HeldOut(None, [])
    name, sign = aim_of(run.config)
    try:
        records = read_metrics(run.folder / METRICS)
        losses, sources = [sign * value for value in series(records, name)[1]], list(by_source(records))
        held_out = HeldOut.of(records, run.inputs.identity[SINCE])
        plot_loss(run.folder / METRICS, run.folder / PICTURE)
    except UserError as error:  # the trained tensors are saved, so go on
        say(f"note: {error}; --resume auto draws it again", file=sys.stderr)
    if code := stopped(run, lit):
        return code, (
            f"stopped after {lit.step:,} of {counted(run.plan.total_steps, 'step')}, saved in {run.folder}; "
            "the same command with --resume goes on"
        )
    answers = [] if run.rows is None else list(run.rows.lines())
    report = [*under("sources", sources), *under("answers", answers)]
    report += notes_on(run.config, run.plan, losses, records, run.rows)
    figures = [("steps", f"{run.plan.total_steps:,}")]
    if fall := fall_of(losses):
        figures.append((name, f"{fall.in_words(sign)}, the first and last quarter's mean"))
    figures += [("sources", line) for line in sources]
    figures += [("answers", line) for line in answers if not line.startswith(" ")]
    if held_out.losses:
        figures.append(("validation", held_out_line(held_out, name, sign)))
        report += on_held_out(run, held_out, name, sign)
    elif run.config.data.of_answers and VALIDATION not in run.inputs.measured:
        report.append(f"validation  {UNKNOWN}")
    use = write_run_card(run, figures, say)
    report.append(f"finished  {run.saver.newest}, {run.folder / PICTURE}, {run.folder / METRICS}{use}")
    return 0, "\n".join(report)


def under(label: str, lines: Iterable[str]) -> Iterator[str]:
    """Yield lines in a column, the first behind the label."""
    for number, line in enumerate(lines):
        yield f"{'' if number else label:<10}{line}"


def on_held_out(run: Prepared, held_out: HeldOut, name: str, sign: int) -> Iterator[str]:
    """Yield the lines about the validation of a run, the last a note if it learned nothing that holds for others."""
    best = labelled(run.saver.newest, BEST)
    patience = counted(run.config.train.early_stop, "validation")
    early = f"; stopped after {patience} without a lower one" if run.exhausted else ""
    yield f"validation  {held_out_line(held_out, name, sign)}, {best}{early}"
    if sign > 0 and (note := overfitted(held_out, run.plan, best)):
        yield note


def write_run_card(run: Prepared, figures: Sequence[tuple[str, str]], say: Callable[..., object]) -> str:
    """Write the card of a run's folder -> a clause that names it, "" if it was not written."""
    card, chosen = run.folder / CARD, take(run.folder, run.saver.newest.name).path
    try:
        if write_card(run.folder, card_of(run.folder.resolve().name, [chosen], figures)):
            return f"; {card} says how to use it"
        say(f"note: {card} is yours and stays; the run's own card is not written", file=sys.stderr)
    except UserError as error:  # the tensors that it describes are saved
        say(f"note: no card was written: {error}", file=sys.stderr)
    return ""
