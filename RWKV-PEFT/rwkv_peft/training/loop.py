"""The training loop. train.py, `rp.train` and study run this one; engine.py moves the weights.

One optimizer step, on every rank alike:

    take_step            for each micro batch: lay it out on the device, seed random numbers, sample completions if the
                         data is prompts, compute the loss and its gradients, and add the step's sums up over ranks
    engine.step          sum gradients over ranks, clip them, and move the weights
    run.validator        measure held-out losses, if it is time
    examine              ask the questions and log the rollouts that are due
    record, show         write a line of metrics.jsonl, feed the trackers, move the progress bar
    save                 save, if it is time

After the last one, run.bound scales back what was trained (--forget_at_most), and run.rows are answered.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

import torch
import torch.distributed as dist

from ..cli.errors import Diverged, is_gpu_memory
from ..cli.names import METRICS
from ..data.batches import TrainBatch, TrainBatches
from .prepared import TrainingRun
from .progress import Progress, in_words
from .saving.resume import forget_rest
from .saving.saver import load_checkpoint
from .step.steps import seed_micro_batch

PLACE = ("step", "samples")  # a record's place in the run, which trackers do not get as numbers
MEMORY_REMEDY = (
    "lower --micro_bsz or --ctx_len, or take --grad_cp 1, --quant nf4 or a smaller rank (rwkv-peft plan counts the "
    "memory of a run)"
)
Metrics = dict[str, Any]


@dataclass
class StopRequest:
    """A request to save and stop after the current step: the number of the signal that made it, 0 for none.

    stage: of the loop, "before" its first step, in its "steps" or "after" the last one.
    """

    signal: int = 0
    stage: str = "before"


class StepSums:
    """Sums of one optimizer step over its micro batches and all ranks.

    loss and measures are means over the counted tokens of the step; tokens are those that were read, padding included;
    counted is the number of the objective's items. stop and save are true once any rank requested that.
    """

    def __init__(self, ranks: int, micro_batches: int) -> None:
        self.ranks, self.parts = ranks, ranks * micro_batches
        self.loss, self.tokens, self.counted = 0.0, 0, 0.0
        self.measures: dict[str, float] = {}
        self.stop = self.save = False

    def reduce(
        self, loss: torch.Tensor, measures: Sequence[torch.Tensor], tokens: int, stop: bool, save: bool
    ) -> torch.Tensor:
        """Start the micro batch's one small sum over ranks -> [loss, measures…, tokens, stop, save], still on its way
        on a GPU."""
        numbers = [number.float() for number in (loss, *measures)]
        # filled on the device, because copying a number to a GPU would wait for the GPU
        status = torch.stack([*numbers, *(numbers[0].new_full((), number) for number in (tokens, stop, save))])
        if self.ranks > 1:
            dist.all_reduce(status)
        return status

    def add(self, names: Sequence[str], status: torch.Tensor, step: int) -> None:
        """Add a micro batch's sum over ranks; this waits for a GPU. Raises Diverged, on every rank, for a loss that is
        not finite."""
        loss, *measures, tokens, stop, save = status.tolist()
        if not math.isfinite(loss):
            raise Diverged(f"the loss became {loss} at step {step + 1}")
        self.loss += loss / self.parts
        for name, measure in zip(names, measures):
            self.measures[name] = self.measures.get(name, 0.0) + measure / self.parts
        self.tokens += int(tokens)
        self.stop, self.save = self.stop or stop > 0, self.save or save > 0


def train(run: TrainingRun, stop: StopRequest, callback: Callable[[Metrics], object] | None = None) -> int:
    """Take the steps of a run -> the number of steps that the model has taken by then, of all sessions.

    stop may be set at any time, by a signal's handler or another thread. callback gets each step's metrics, as
    metrics.jsonl has them. It ends the run by returning something true. Raises Diverged for a loss, a norm or a tensor
    that is not finite, before anything of that step is saved.
    """
    config, plan, engine, compute = run.config.train, run.plan, run.engine, run.compute
    report, done, peak, stopping = Report(run), plan.first_step, 0, False
    run.model.train()
    try:
        if run.bound is not None:
            engine.firsts = engine.copies()  # of a run that goes on the checkpoint fills them
        if run.checkpoint is not None:
            # It fills the engine's masters and moments; the model's weights follow from these.
            load_checkpoint(engine, run.checkpoint)
        start_losses = {} if run.validator is None else run.validator.before(engine)
        if run.rows is not None:
            run.rows.before(engine)
        report.begin(start_losses)
        batches, saved, stop.stage = micro_batches(run), time.monotonic(), "steps"
        for step in range(plan.first_step, plan.total_steps):
            began = time.perf_counter()
            # Rank 0 counts --save_minutes, by a clock that neither a new time of day nor the machine's sleep moves.
            wants_save = engine.rank == 0 and 0 < config.save_minutes * 60 <= time.monotonic() - saved
            # Every rank enters each line from here to the save in the same order: most of them hold a sum over ranks.
            sums = take_step(run, step, batches, stop, wants_save)
            rate = config.rate_at(step, plan.total_steps)
            norm = engine.step(rate)
            seconds, done = time.perf_counter() - began, step + 1
            peak = torch.cuda.max_memory_allocated()  # bytes; 0 without CUDA
            if norm is not None and not math.isfinite(norm):  # clipping would make zeros or NaN of the step
                raise Diverged(f"the gradient norm became {norm} at step {done}")

            validation = {} if run.validator is None else run.validator(engine, done)
            last = run.ends(done)  # --early_stop may end it now
            scores, lines = examine(run, done, last, seconds)
            metrics: Metrics = {
                "step": step,
                "samples": plan.samples_seen(done),
                "epoch": step // plan.epoch_steps,
                "loss": sums.loss if sums.counted else None,  # no token counts: there is no mean
                "lr": rate,
                "grad_norm": norm,
                "tokens": sums.tokens,
                "tokens_per_s": round(sums.tokens / seconds, 1),
                **engine.scale_metrics(),
                **sums.measures,
                **start_losses,  # of the measurements before the first step, in its record
                **validation,
                **scores,
            }
            start_losses = {}
            report.record(metrics)
            report.show(metrics, sums, validation, lines, seconds)
            # sums.stop is a sum over ranks, so that a signal that reached one of them ends all after the same step.
            stopping = stopping or sums.stop or bool(callback is not None and callback(metrics))

            if done % run.config.objective.together == 0:  # else the same completions are learned from once more
                # After the record: a kill in between leaves a line too many, which a resume takes away.
                if save(run, done, sums, last or stopping):
                    saved = time.monotonic()
                if last or stopping:
                    stop.stage = "after"
                    break
            compute.figures = sums.measures  # which the next step's loss may read
        if run.ends(done):  # the last step is saved by now
            if run.bound is not None:
                run.bound.apply(engine, report.say)
            if run.rows is not None:
                run.rows.after(engine)
    except RuntimeError as error:
        if is_gpu_memory(error):
            add_memory_note(error, done, plan.total_steps, peak)
        raise
    finally:
        report.close()
    return done


def micro_batches(run: TrainingRun) -> Iterator[TrainBatch]:
    """The micro batches that this rank has not seen yet, on the CPU."""
    config, plan = run.config.train, run.plan
    batches = TrainBatches(
        run.samples,
        run.config.data.micro_bsz,
        group=run.engine.rank // config.context_parallel,
        groups=config.groups,
        accumulate=config.accumulate_grad_batches,
        samples_seen=plan.first_sample,
        pin_memory=run.engine.device.type == "cuda",
    )
    return islice(batches, (plan.total_steps - plan.first_step) * config.accumulate_grad_batches)


def take_step(run: TrainingRun, step: int, batches: Iterator[TrainBatch], stop: StopRequest, save: bool) -> StepSums:
    """Compute the gradients of one optimizer step -> its sums.

    Every counted token of the step weighs the same, whatever the number of ranks and micro batches: each batch has the
    count of the whole step.
    """
    engine, compute, number = run.engine, run.compute, run.config.train.accumulate_grad_batches
    sums = StepSums(engine.ranks, number)
    for micro in range(number):
        batch = compute.prepare_inputs(next(batches), engine.device)
        seed_micro_batch(run.config.train.random_seed, (step * number + micro) * engine.ranks + engine.rank)
        # The engine averages gradients over ranks and micro batches; with this denominator that average is the mean
        # over the counted tokens of the whole step.
        # step_count is 0 if no token of the step counts; the loss is 0 then, and stays so divided by 1.
        loss, tokens = engine.forward(batch, (batch["step_count"] or 1) / sums.parts)
        # started before backward, so that a GPU adds up meanwhile; read behind it, because reading waits for the GPU
        status = sums.reduce(loss.detach(), [*compute.measures.values()], tokens, stop.signal != 0, save)
        engine.backward(loss)
        sums.add([*compute.measures], status, step)
        sums.counted = batch["step_count"]
    return sums


def examine(run: TrainingRun, done: int, last: bool, seconds: float) -> tuple[dict[str, float], list[str]]:
    """Run the exams that are due after `done` steps -> (numbers by name, lines to print)."""
    scores: dict[str, float] = {}
    lines: list[str] = []
    for examiner in run.examiners:
        numbers, words = examiner(run.engine, done, last)
        scores |= numbers
        lines += words
    if "draw_s" in scores:
        scores["learn_s"] = seconds - scores["draw_s"] - scores["judge_s"]
    return scores, lines


def save(run: TrainingRun, done: int, sums: StepSums, ending: bool) -> bool:
    """Save after `done` steps if it is time: every epoch_save epochs, every save_every steps, save_minutes after the
    last save, and at the end -> True if that was so."""
    config = run.config.train
    epoch, rest = divmod(done, run.plan.epoch_steps)
    by_epoch = rest == 0 and config.epoch_save and epoch % config.epoch_save == 0
    by_steps = config.save_every and done % config.save_every == 0
    saves = bool(ending or by_epoch or by_steps or sums.save)
    if saves and run.saver is not None:
        run.saver.save(run.engine, done, epoch if rest == 0 and (ending or by_epoch) else None, sums.measures)
    return saves


class Report:
    """What the first rank of a run writes and prints: metrics.jsonl, the trackers and the progress bar."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.file: TextIO | None = None
        self.progress: Progress | None = None

    def begin(self, start_losses: Mapping[str, float]) -> None:
        """Open the files, without the records that a resumed run writes again. Print the losses before training."""
        run = self.run
        if not run.leads:
            return
        # A run that stopped between two saves has recorded steps that it takes again now.
        for path in (run.folder / METRICS, *(examiner.path for examiner in run.examiners)):
            forget_rest(path, run.plan)
        # buffering=1: a line is on its way to the disk when its step is done, and others read along.
        self.file = open(run.folder / METRICS, "a", buffering=1)  # noqa: SIM115 # close() closes it
        self.progress = Progress(run.plan) if run.shows_progress else None
        if start_losses:
            losses = {name.replace("_start", "_loss"): loss for name, loss in start_losses.items()}
            self.say(f"before the first step: {in_words(losses, run.config.objective)}")

    def record(self, metrics: Metrics) -> None:
        """Write a step's line of metrics.jsonl and give its numbers to the trackers."""
        if self.file is None:
            return
        self.file.write(json.dumps(metrics) + "\n")
        numbers = {name: value for name, value in metrics.items() if value is not None and name not in PLACE}
        for tracker in self.run.trackers:
            tracker.log(numbers, metrics["step"])

    def show(
        self, metrics: Metrics, sums: StepSums, validation: dict[str, float], lines: Sequence[str], seconds: float
    ) -> None:
        """Print a step's validation and the exams' lines; move the progress bar."""
        if self.progress is None:
            return
        done, objective = metrics["step"] + 1, self.run.config.objective
        if validation:
            self.say(f"step {done:,}: {in_words(validation, objective)}")
        for line in lines:
            self.say(f"step {done:,}: {line}")
        text = f"loss {sums.loss:.4f}" if sums.counted else "no token counts in the loss"
        for figure in objective.shown:
            text += f", {figure.name} {metrics[figure.name]:.2f}"
        if metrics.get("skipped"):
            text += f", step skipped: loss scale {metrics['loss_scale']:g}"
        self.progress.update(f"{text}, lr {metrics['lr']:.1e}", done, seconds, sums.tokens)

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)

    def close(self) -> None:
        """Close metrics.jsonl, the trackers and the progress bar."""
        if self.file is not None:
            self.file.close()
        for tracker in self.run.trackers:
            tracker.close()
        if self.progress is not None:
            self.progress.close()


def add_memory_note(error: RuntimeError, done: int, total: int, peak: int) -> None:
    """Add the step that failed, the peak of those before and the remedy to an error's notes, as its message has them.

    peak: bytes of a GPU's memory that the steps before needed at most, 0 if none was taken.
    """
    before = f", and those before needed {peak / 2**30:.1f} GiB at most" if peak else ""
    note = f"step {done + 1:,} of {total:,} did not fit{before}; {MEMORY_REMEDY}"
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # Python 3.10 has no add_note
