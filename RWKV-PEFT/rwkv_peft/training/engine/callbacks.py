"""The callbacks of a run: they draw the progress bar, write metrics.jsonl, feed the loggers, save, and stop the run."""

import json
import math
import signal
import time
from collections.abc import Callable
from threading import Thread
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from ...cli.errors import hangup_signals
from ...cli.names import METRICS
from ...data.batches import TrainBatch
from ..ranks.watch import Watch
from ..saving.resume import forget_rest
from ..saving.saver import load_checkpoint
from ..step.lit import Diverged, Lit
from ..step.zero import dynamic_scaler, skipped
from .prepared import Prepared
from .progress import Progress, in_words

PLACE = ("step", "samples")  # a line's place in the run, which loggers do not get as numbers


class StepCallback(pl.Callback):
    """Calls on_step after each optimizer step; `done` counts the steps finished since the run first began."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate

    def on_train_batch_end(self, trainer: Any, lit: Lit, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            self.on_step(trainer, lit, done=lit.step + 1)

    def on_step(self, trainer: Any, lit: Lit, done: int) -> None:
        """Called after each optimizer step."""


def gradient_norm(trainer: Any) -> float | None:
    """The norm of the last step's gradient, over all ranks and before clipping; None if the engine has none."""
    norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()
    if norm is None:
        return None
    return math.nan if norm < 0 else float(norm)  # DeepSpeed writes -1 for a norm that is not finite


class Moves(pl.Callback):
    """Tells the watch (training/ranks/watch.py) of every micro batch."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: Any, lit: Lit, batch: TrainBatch, batch_idx: int) -> None:
        self.watch.moved(f"step {lit.step + 1}")

    def on_train_batch_end(self, trainer: Any, lit: Lit, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        self.watch.moved(f"the end of step {lit.step + 1}")


class FiniteGradients(StepCallback):
    """Raises Diverged, on all ranks, if the gradient norm is not finite, because clipping then makes zeros or NaN of
    the step; in float16 only if no lower loss scale is left. It must stand before the callbacks that record and
    save."""

    def on_step(self, trainer: Any, lit: Lit, done: int) -> None:
        norm = gradient_norm(trainer)
        if norm is not None and not math.isfinite(norm) and not skipped(trainer.optimizers[0]):
            raise Diverged(f"the gradient norm became {norm} at step {lit.step + 1}")


class Record(StepCallback):
    """Writes one line a step to metrics.jsonl (rank 0), feeds the loggers and draws the progress bar.

    It calls the validator and the examiners, whose results join the line, and the rows, whose answers do not.
    tokens_per_s counts the tokens of all ranks, padding included, over the step's wall time, validation, questions and
    saving excluded.
    """

    def __init__(self, run: Prepared) -> None:
        super().__init__(run.config.train.accumulate_grad_batches)
        self.run, self.path, self.plan, self.objective = run, run.folder / METRICS, run.plan, run.config.objective
        self.ending = False  # true once the last step is done
        self.tokens = 0
        self.before: dict[str, float] = {}  # measured before the first step, for its line

    def on_train_start(self, trainer: Any, lit: Lit) -> None:
        if self.run.validator is not None:
            self.before = self.run.validator.before(trainer, lit)
        if self.run.rows is not None:
            self.run.rows.before(trainer, lit)
        if trainer.is_global_zero:
            for path in (self.path, *(examiner.path for examiner in self.run.examiners)):
                forget_rest(path, self.plan)
            self.file = open(self.path, "a", buffering=1)
            self.progress = Progress(self.plan)
            if self.before:
                losses = {name.replace("_start", "_loss"): loss for name, loss in self.before.items()}
                self.progress.say(f"before the first step: {in_words(losses, self.objective)}")
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, lit: Lit, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        self.tokens += lit.micro_tokens
        super().on_train_batch_end(trainer, lit, outputs, batch, batch_idx)

    def on_step(self, trainer: Any, lit: Lit, done: int) -> None:
        seconds = time.perf_counter() - self.start
        tokens, self.tokens = self.tokens, 0
        validation = {} if self.run.validator is None else self.run.validator(trainer, lit, done)
        self.ending = self.run.ends(done)
        scores: dict[str, float] = {}
        told: list[str] = []
        for examiner in self.run.examiners:
            found, words = examiner(trainer, lit, done, self.ending)
            scores |= found
            told += words
        if "draw_s" in scores:
            scores["learn_s"] = seconds - scores["draw_s"] - scores["judge_s"]
        if not trainer.is_global_zero:
            return
        scaler, skips = dynamic_scaler(trainer.optimizers[0]), skipped(trainer.optimizers[0])
        metrics = {
            "step": lit.step,
            "samples": self.plan.samples_seen(done),
            "epoch": lit.step // self.plan.epoch_steps,
            "loss": lit.step_loss if lit.step_tokens else None,  # no token counts: there is no mean
            "lr": lit.lr,
            "grad_norm": None if skips else gradient_norm(trainer),
            "tokens": tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            **({} if scaler is None else {"loss_scale": scaler.cur_scale, "skipped": int(skips)}),
            **lit.step_measures,
            **self.before,
            **validation,
            **scores,
        }
        self.before = {}
        self.file.write(json.dumps(metrics) + "\n")
        numbers = {key: value for key, value in metrics.items() if value is not None and key not in PLACE}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=lit.step)
        if validation:
            self.progress.say(f"step {done:,}: {in_words(validation, self.objective)}")
        for line in told:
            self.progress.say(f"step {done:,}: {line}")
        loss = f"loss {lit.step_loss:.4f}" if lit.step_tokens else "no token counts in the loss"
        for figure in self.objective.figures[:1]:
            loss += f", {figure.name} {metrics[figure.name]:.2f}"
        if skips:
            loss += f", step skipped: loss scale {metrics['loss_scale']:g}"
        self.progress.update(f"{loss}, lr {lit.lr:.1e}", done, seconds, tokens)

    def on_train_batch_start(self, trainer: Any, lit: Lit, batch: TrainBatch, batch_idx: int) -> None:
        if batch_idx % self.accumulate == 0:
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Any, lit: Lit) -> None:
        if self.ending and self.run.validator is not None:  # Save has saved the last step
            self.run.validator.after(trainer, lit)
        if self.ending and self.run.rows is not None:
            self.run.rows.after(trainer, lit)
        self.close(trainer)

    def on_exception(self, trainer: Any, lit: Lit, exception: BaseException) -> None:
        self.close(trainer)

    def close(self, trainer: Any) -> None:
        if trainer.is_global_zero and hasattr(self, "file"):
            self.file.close()
            self.progress.close()


class Save(StepCallback):
    """Restores the checkpoint, if any, before the first step, then saves every epoch_save epochs, every save_every
    steps and save_minutes after the last save. It saves and stops the run when that ends, or if a stop was asked for;
    always after a multiple of the steps that learn from the same answers.

    Rank 0 counts the minutes, by a clock that neither a new time of day nor the machine's sleep moves.
    """

    def __init__(self, run: Prepared) -> None:
        self.run, train = run, run.config.train
        super().__init__(train.accumulate_grad_batches)
        self.epochs, self.steps, self.minutes = train.epoch_save, train.save_every, train.save_minutes

    def on_train_start(self, trainer: Any, lit: Lit) -> None:
        if self.run.checkpoint is not None:
            load_checkpoint(trainer, lit, self.run.checkpoint)
        self.saved = time.monotonic()

    def on_train_batch_start(self, trainer: Any, lit: Lit, batch: TrainBatch, batch_idx: int) -> None:
        passed = time.monotonic() - self.saved
        lit.save_requested = trainer.is_global_zero and 0 < self.minutes * 60 <= passed

    def on_step(self, trainer: Any, lit: Lit, done: int) -> None:
        if done % self.run.config.objective.together:
            return
        epoch, rest = divmod(done, self.run.plan.epoch_steps)
        ending = lit.stopping or self.run.ends(done)
        by_epoch = rest == 0 and self.epochs and epoch % self.epochs == 0
        if ending or by_epoch or lit.saving or (self.steps and done % self.steps == 0):
            self.run.saver.save(trainer, lit, done, epoch if rest == 0 and (ending or by_epoch) else None)
            self.saved = time.monotonic()
        if ending:
            trainer.should_stop = True


class StopSignals(pl.Callback):
    """From the first step on, Ctrl-C, SIGTERM and a terminal that goes away (SIGHUP) ask for a save and a stop after
    the current step; a second Ctrl-C or SIGTERM stops at once.

    The handlers replace Lightning's own, which would end the run at SIGTERM without saving, and would restore Python's
    in the middle of the trainer's end: a SIGHUP that is ignored by then would be heard again.
    """

    def __init__(self, say: Callable[..., object]) -> None:
        self.say = say

    def on_train_start(self, trainer: Any, lit: Lit) -> None:
        def ask(number: int, frame: FrameType | None) -> None:
            if lit.stop_requested:
                raise KeyboardInterrupt(number)
            lit.stop_requested = number
            if not trainer.should_stop:  # or the run is ending anyway
                words = "\nstopping after this step; again to stop at once, without saving"
                # by another thread, because this one may be in the middle of a print
                Thread(target=self.say, args=(words,), kwargs={"flush": True}).start()

        def hang_up(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_IGN)  # both the system and the shell send one
            lit.stop_requested = lit.stop_requested or number

        trainer._signal_connector.teardown()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)
        for number in hangup_signals():
            signal.signal(number, hang_up)
