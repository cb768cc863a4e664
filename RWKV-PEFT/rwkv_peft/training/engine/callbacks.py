"""The callback of a run: around Lit's steps it measures, writes metrics.jsonl, feeds the loggers, saves and stops."""

import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from threading import Thread
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from ...cli.errors import hangup_signals
from ...cli.names import METRICS
from ...data.batches import TrainBatch
from ..saving.resume import forget_rest
from ..saving.saver import load_checkpoint
from ..step.lit import Diverged, Lit
from ..step.zero import dynamic_scaler, skipped
from .prepared import Prepared
from .progress import Progress, in_words

PLACE = ("step", "samples")  # a line's place in the run, which loggers do not get as numbers
REMEDY = (
    "lower --micro_bsz or --ctx_len, or take --grad_cp 1, --quant nf4 or a smaller rank (rwkv-peft plan counts the "
    "memory of a run)"
)


class RunCallback(pl.Callback):
    """All that a run does besides learning, on all ranks; rank 0 writes and prints.

    Line by line metrics.jsonl has a step's loss, rate, gradient norm and speed, with the results of validation and of
    questions. tokens_per_s counts the tokens of all ranks, padding included, over the step's wall time without
    validation, questions and saving.

    A checkpoint is saved every epoch_save epochs, every save_every steps, save_minutes after the last one, and at the
    end; but never between steps that learn from the same completions. Rank 0 counts the minutes, by a
    clock that neither a new time of day nor the machine's sleep moves.
    """

    def __init__(self, run: Prepared, say: Callable[..., object] = print) -> None:
        self.run, self.say, self.train = run, say, run.config.train
        self.tokens = 0  # of the step so far
        self.start_losses: dict[str, float] = {}  # measured before the first step, for its line
        self.ending = False  # true once the last step is done
        self.peak = 0  # bytes of a GPU's memory in the steps so far

    def on_train_start(self, trainer: Any, lit: Lit) -> None:
        run = self.run
        if run.checkpoint is not None:
            load_checkpoint(trainer, lit, run.checkpoint)
        if run.validator is not None:
            self.start_losses = run.validator.before(trainer, lit)
        if run.rows is not None:
            run.rows.before(trainer, lit)
        if trainer.is_global_zero:
            for path in (run.folder / METRICS, *(examiner.path for examiner in run.examiners)):
                forget_rest(path, run.plan)
            self.file = open(run.folder / METRICS, "a", buffering=1)
            self.progress = Progress(run.plan)
            if self.start_losses:
                losses = {name.replace("_start", "_loss"): loss for name, loss in self.start_losses.items()}
                self.progress.say(f"before the first step: {in_words(losses, run.config.objective)}")
        trainer._signal_connector.teardown()  # Lightning's handlers would end the run at SIGTERM without saving
        handle_signals(trainer, lit, self.say)
        self.began, self.saved = time.perf_counter(), time.monotonic()

    def on_train_batch_start(self, trainer: Any, lit: Lit, batch: TrainBatch, batch_idx: int) -> None:
        if batch_idx % self.train.accumulate_grad_batches == 0:
            self.began = time.perf_counter()
        passed = time.monotonic() - self.saved
        lit.save_requested = trainer.is_global_zero and 0 < self.train.save_minutes * 60 <= passed

    def on_train_batch_end(self, trainer: Any, lit: Lit, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        self.tokens += lit.micro_tokens
        if (batch_idx + 1) % self.train.accumulate_grad_batches:
            return  # the optimizer steps after the last micro batch
        seconds, done = time.perf_counter() - self.began, lit.step + 1
        self.peak = torch.cuda.max_memory_allocated()
        norm = self.gradient_norm(trainer, lit)
        validation = {} if self.run.validator is None else self.run.validator(trainer, lit, done)
        self.ending = self.run.ends(done)  # --early_stop may end it now
        scores, lines = self.examine(trainer, lit, done, seconds)
        if trainer.is_global_zero:
            metrics = self.metrics(trainer, lit, norm, seconds) | validation | scores
            self.record(trainer, lit, metrics)
            self.show(lit, metrics, validation, lines, seconds)
        self.start_losses, self.tokens = {}, 0
        self.save(trainer, lit, done)

    def gradient_norm(self, trainer: Any, lit: Lit) -> float | None:
        """The norm of the step's gradient, over all ranks and before clipping; None if the engine has none or skipped
        the step.

        Raises Diverged, on all ranks, for a norm that is not finite, because clipping then makes zeros or NaN of the
        step; in float16 only if no lower loss scale is left.
        """
        norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()
        if norm is None or skipped(trainer.optimizers[0]):
            return None
        norm = math.nan if norm < 0 else float(norm)  # DeepSpeed writes -1 for a norm that is not finite
        if not math.isfinite(norm):
            raise Diverged(f"the gradient norm became {norm} at step {lit.step + 1}")
        return norm

    def examine(self, trainer: Any, lit: Lit, done: int, seconds: float) -> tuple[dict[str, float], list[str]]:
        """Run the exams that are due after `done` steps -> (numbers by name, lines to print)."""
        scores: dict[str, float] = {}
        lines: list[str] = []
        for examiner in self.run.examiners:
            found, words = examiner(trainer, lit, done, self.ending)
            scores |= found
            lines += words
        if "draw_s" in scores:
            scores["learn_s"] = seconds - scores["draw_s"] - scores["judge_s"]
        return scores, lines

    def metrics(self, trainer: Any, lit: Lit, norm: float | None, seconds: float) -> dict[str, Any]:
        """The numbers of the step that has just been taken, by name, and of the measurements before the first."""
        plan, optimizer = self.run.plan, trainer.optimizers[0]
        scaler = dynamic_scaler(optimizer)
        return {
            "step": lit.step,
            "samples": plan.samples_seen(lit.step + 1),
            "epoch": lit.step // plan.epoch_steps,
            "loss": lit.step_loss if lit.step_tokens else None,  # no token counts: there is no mean
            "lr": lit.lr,
            "grad_norm": norm,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / seconds, 1),
            **({} if scaler is None else {"loss_scale": scaler.cur_scale, "skipped": int(skipped(optimizer))}),
            **lit.step_measures,
            **self.start_losses,
        }

    def record(self, trainer: Any, lit: Lit, metrics: dict[str, Any]) -> None:
        """Write a step's line of metrics.jsonl, and log its numbers."""
        self.file.write(json.dumps(metrics) + "\n")
        numbers = {key: value for key, value in metrics.items() if value is not None and key not in PLACE}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=lit.step)

    def show(
        self, lit: Lit, metrics: dict[str, Any], validation: dict[str, float], lines: Sequence[str], seconds: float
    ) -> None:
        """Print a step's validation and the examiners' lines, and move the progress bar."""
        done, objective = lit.step + 1, self.run.config.objective
        if validation:
            self.progress.say(f"step {done:,}: {in_words(validation, objective)}")
        for line in lines:
            self.progress.say(f"step {done:,}: {line}")
        loss = f"loss {lit.step_loss:.4f}" if lit.step_tokens else "no token counts in the loss"
        for figure in objective.shown:
            loss += f", {figure.name} {metrics[figure.name]:.2f}"
        if metrics.get("skipped"):
            loss += f", step skipped: loss scale {metrics['loss_scale']:g}"
        self.progress.update(f"{loss}, lr {lit.lr:.1e}", done, seconds, self.tokens)

    def save(self, trainer: Any, lit: Lit, done: int) -> None:
        """Save after `done` steps if it is time, and stop the run if it is over or a stop was requested."""
        train, plan = self.train, self.run.plan
        if done % self.run.config.objective.together:
            return
        epoch, rest = divmod(done, plan.epoch_steps)
        ending = lit.stopping or self.run.ends(done)
        by_epoch = rest == 0 and train.epoch_save and epoch % train.epoch_save == 0
        if ending or by_epoch or lit.saving or (train.save_every and done % train.save_every == 0):
            self.run.saver.save(trainer, lit, done, epoch if rest == 0 and (ending or by_epoch) else None)
            self.saved = time.monotonic()
        if ending:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, lit: Lit) -> None:
        if self.ending and self.run.rows is not None:  # the last step is saved by now
            self.run.rows.after(trainer, lit)
        self.close(trainer)

    def on_exception(self, trainer: Any, lit: Lit, exception: BaseException) -> None:
        if isinstance(exception, torch.OutOfMemoryError):
            self.add_memory_note(lit, exception)
        self.close(trainer)

    def add_memory_note(self, lit: Lit, error: torch.OutOfMemoryError) -> None:
        """Add the failed step, the peak of those before and the remedy to an error's notes, as its message has them."""
        before = f", and those before needed {self.peak / 2**30:.1f} GiB at most" if self.peak else ""
        note = f"step {lit.step + 1:,} of {self.run.plan.total_steps:,} did not fit{before}; {REMEDY}"
        error.__notes__ = [*getattr(error, "__notes__", []), note]  # Python 3.10 has no add_note

    def close(self, trainer: Any) -> None:
        """Close metrics.jsonl and the progress bar."""
        if trainer.is_global_zero and hasattr(self, "file"):
            self.file.close()
            self.progress.close()


def handle_signals(trainer: Any, lit: Lit, say: Callable[..., object]) -> None:
    """From now on, Ctrl-C, SIGTERM and a terminal that goes away (SIGHUP) request a save and a stop after the current
    step; a second Ctrl-C or SIGTERM stops at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if lit.stop_requested not in (0, signal.SIGHUP):  # an agent sends SIGTERM after a second SIGHUP
            raise KeyboardInterrupt(number)
        lit.stop_requested = number
        if not trainer.should_stop:  # or the run is ending anyway
            words = "\nstopping after this step; again to stop at once, without saving"
            # by another thread, because this one may be in the middle of a print
            Thread(target=say, args=(words,), kwargs={"flush": True}).start()

    def hang_up(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # both the system and the shell send one
        lit.stop_requested = lit.stop_requested or number

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for number in hangup_signals():
        signal.signal(number, hang_up)
