"""Show the progress of a run and the time it still takes: as a bar on a terminal, as lines in a log."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..config import Objective
from ..ops.native.build import COMPILING
from ..plots import LOSSES, of_files
from .step.plan import Plan

QUIET = 10  # seconds between two lines of a log


def in_words(validation: dict[str, float], objective: Objective) -> str:
    """Put the numbers of a Validator in words."""
    words = {"val_ppl": ("perplexity", 2)} | {f"val_{name}": (name, 3) for name, *_ in objective.figures}
    words |= {name: (word, 4) for name, word in LOSSES.items()}
    words |= {name: (f"of {file}", 4) for name, _, file in of_files(validation)}
    shown = ((*words[name], value) for name, value in validation.items() if name in words)
    return ", ".join(f"{word} {value:.{digits}f}" for word, digits, value in shown)


def in_notebook() -> bool:
    """True if this process is a notebook's kernel, which draws a bar as a terminal does. Others may import IPython."""
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None


class Progress:
    """Show progress and ETA: a moving bar on a terminal; in a log file a line every ten seconds.

    The first step of a process counts neither in the speed nor in the ETA: it also loads and compiles kernels.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.last_line = plan, 0.0
        self.began: float | None = None  # when the second step began
        self.bar: tqdm | None = None
        if sys.stdout.isatty() or in_notebook():
            self.bar = tqdm(
                total=plan.total_steps,
                initial=plan.first_step,
                # the rest of tqdm's bar is left out, so that the numbers fit 80 columns
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
                dynamic_ncols=True,
                file=sys.stdout,
                mininterval=0.2,
            )

    def update(self, text: str, done: int, seconds: float, tokens: int) -> None:
        """Show `text` after `done` steps; the last one read `tokens` tokens in `seconds` seconds."""
        now = time.perf_counter()
        if self.began is None:
            self.began, left = now, f"the first step took {seconds:.0f} s"
        else:
            rest = (now - self.began) / (done - self.plan.first_step - 1) * (self.plan.total_steps - done)
            text, left = f"{text}, {tokens / seconds:,.0f} tokens/s", f"ETA {tqdm.format_interval(rest)}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{left}, {text}", refresh=False)
            self.bar.update()
        elif now - self.last_line >= QUIET or done == self.plan.total_steps:
            self.last_line = now
            print(f"step {done:,}/{self.plan.total_steps:,}, {text}, {left}", flush=True)

    def say(self, text: str) -> None:
        """Print `text` as a line of its own, past the bar."""
        self.bar.write(text, file=sys.stdout) if self.bar is not None else print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Compilations(logging.Handler):
    """Print a line for each kernel that is compiled: it takes up to minutes, once on a machine."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stdout)


@contextmanager
def printing_compilations(prints: bool) -> Iterator[None]:
    """Within, print which kernels are compiled; nothing on ranks that do not print."""
    handler = Compilations(logging.INFO if prints else logging.CRITICAL)
    COMPILING.addHandler(handler)
    COMPILING.setLevel(logging.INFO)
    try:
        yield
    finally:
        COMPILING.removeHandler(handler)
