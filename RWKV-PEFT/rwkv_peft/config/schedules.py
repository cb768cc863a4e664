"""The learning-rate schedules, as functions of the optimizer step and as the formulas that --help gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

WSD_DECAY = 0.1  # the share of the run that warmup-stable-decay spends on its final descent


@dataclass(frozen=True)
class Run:
    """The settings of a schedule: total steps, warm-up steps, and the learning rates --lr_init and --lr_final."""

    total_steps: int
    warmup_steps: int
    lr_init: float
    lr_final: float

    def after_warm_up(self, step: int) -> float:
        """The progress from the last step of warm-up to the last of the run."""
        return self.progress(step, self.warmup_steps, self.total_steps - 1)

    def progress(self, step: int, start: int, end: int) -> float:
        """The progress at a step: 0 up to step `start`, 1 from step `end` on, and linear between them."""
        return min(1.0, max(0.0, (step - start) / max(1, end - start)))

    def line(self, progress: float) -> float:
        return self.lr_init + (self.lr_final - self.lr_init) * progress

    def half_wave(self, progress: float) -> float:
        return self.lr_final + (self.lr_init - self.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(run: Run, step: int) -> float:
    start = max(run.warmup_steps, run.total_steps - math.ceil(run.total_steps * WSD_DECAY))
    return run.line(run.progress(step, start, run.total_steps - 1))


def exp(run: Run, step: int) -> float:
    """RWKV-LM's schedule without --my_exit_tokens: exponential, or linear if one of the rates is 0."""
    progress = run.progress(step, run.warmup_steps - 1, run.total_steps - 1)
    if run.lr_init == 0 or run.lr_final == 0:
        return run.line(progress)
    return run.lr_init * (run.lr_final / run.lr_init) ** progress


def from_the_first(run: Run, step: int) -> float:
    """The share of the rate in a warm-up of W steps: 1 / W at the first step, 1 at the last."""
    return (step + 1) / run.warmup_steps


def from_a_hundredth(run: Run, step: int) -> float:
    """The share of the rate in RWKV-LM's warm-up: 0.01 at its first step, 1 at the first step after it."""
    return 0.01 + 0.99 * step / run.warmup_steps


class Schedule(NamedTuple):
    """A value of --lr_schedule: its formula in --help, the rate after warm-up, and the share of it during warm-up."""

    formula: str
    rate: Callable[[Run, int], float]
    warm_up: Callable[[Run, int], float] = from_the_first


# formulas give the rate at step s = 0 … S - 1 of a run of S steps, W of them warm-up, from a = lr_init to z = lr_final;
# clip keeps a number within 0 and 1, and W = 0 is no warm-up
SCHEDULES = MappingProxyType(
    {
        "cosine": Schedule(
            "min(1, (s + 1) / W) * (z + (a - z) * (1 + cos(pi * clip((s - W) / (S - 1 - W)))) / 2)",
            lambda run, step: run.half_wave(run.after_warm_up(step)),
        ),
        "linear": Schedule(
            "min(1, (s + 1) / W) * (a + (z - a) * clip((s - W) / (S - 1 - W)))",
            lambda run, step: run.line(run.after_warm_up(step)),
        ),
        "constant": Schedule("min(1, (s + 1) / W) * a", lambda run, step: run.lr_init),
        "wsd": Schedule(
            "min(1, (s + 1) / W) * (a + (z - a) * clip((s - D) / (S - 1 - D))), D = max(W, S - ceil(S / 10))", wsd
        ),
        "exp": Schedule(
            "min(1, 0.01 + 0.99 * s / W) * a * (z / a) ** clip((s - W + 1) / (S - W))", exp, from_a_hundredth
        ),
        # RWKV-LM's with --my_exit_tokens, and RWKV-PEFT's cos_decay, would reach lr_final one step after the run
        "rwkv-lm": Schedule(
            "min(1, 0.01 + 0.99 * s / W) * (z + (a - z) * (1 + cos(pi * clip((s - W) / (S - W)))) / 2)",
            lambda run, step: run.half_wave(run.progress(step, run.warmup_steps, run.total_steps)),
            from_a_hundredth,
        ),
        "rwkv-peft": Schedule(
            "z + (a - z) * (1 + cos(pi * s / S)) / 2",
            lambda run, step: run.half_wave(run.progress(step, 0, run.total_steps)),
            lambda run, step: 1.0,
        ),
    }
)


def learning_rate(
    step: int, *, total_steps: int, lr_init: float, lr_final: float, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total_steps`, by the formula in SCHEDULES.

    Sources of other projects' schedules: RWKV-LM's RWKV-v5/src/trainer.py (exp, rwkv-lm), RWKV-PEFT's
    rwkvt/trick/lrs.py (rwkv-peft).
    """
    run = Run(total_steps, warmup_steps, lr_init, lr_final)
    _, rate, warm_up = SCHEDULES[schedule]
    share = warm_up(run, step) if step < warmup_steps else 1.0
    return rate(run, step) * share
