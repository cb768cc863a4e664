"""The runs of a comparison as processes of train.py, each in a folder of its own, and their outcomes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...checkpoints.atomic import write_text
from ...checkpoints.lock import alone_in
from ...children import python_command
from ...cli.errors import UserError
from ...training.saving.checkpoints import DIVERGED, find_checkpoint
from ...training.saving.resume import AUTO
from .flags import Comparison, method_flags
from .outcomes import RESULT, Outcome, read_outcome
from .plan import Cell, rate_of
from .sizes import Size

CHILD = f"{__package__}.child"  # the module that each run is a process of
LOG = "log.txt"
POLL = 0.1  # seconds between looks at the processes


@dataclass
class Process:
    """A run in progress; code and peak_mb are its exit code and peak memory once it has ended."""

    cell: Cell
    folder: Path
    began: float
    child: subprocess.Popen[bytes]
    code: int | None = None
    peak_mb: float = field(default=math.nan)

    def poll(self) -> bool:
        """Return whether the process has ended, and note its exit code and peak memory if so."""
        pid, status, usage = os.wait4(self.child.pid, os.WNOHANG)
        if pid:
            self.code = self.child.returncode = os.waitstatus_to_exitcode(status)
            self.peak_mb = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        return self.code is not None


def any_begun(folder: Path) -> bool:
    """Return whether a run of the comparison in a folder is complete or has saved a checkpoint."""
    return any((run / RESULT).exists() or find_checkpoint(run) for run in (folder / "runs").glob("*"))


def train_flags(comparison: Comparison, cell: Cell, size: Size, folder: Path) -> list[str]:
    """The flags of train.py for one run."""
    rate = rate_of(cell.rate)
    own = {
        "--lr_init": rate,
        "--lr_final": rate * comparison.lr_final,
        "--random_seed": cell.seed,
        "--epoch_steps": comparison.steps,
        "--epoch_count": 1,
        "--val_every": comparison.val_every,
        "--proj_dir": folder,
    }
    words = [str(word) for pair in own.items() for word in pair]
    few = ("--answer_rows", "0")  # nobody reads them, unless they are asked for
    return [*few, *comparison.train, *method_flags(cell.method, size.rank, size.mini_rank), *words]


def start(comparison: Comparison, cell: Cell, size: Size, folder: Path) -> Process:
    """Start a run, or resume one that has a checkpoint, even one of its last step, because the end of the run may still
    have work to do."""
    resume = find_checkpoint(folder) is not None
    if folder.exists() and not resume:
        with alone_in(folder):  # a run may still work in it if its comparison was killed
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    argv = python_command(CHILD, *train_flags(comparison, cell, size, folder))
    environment = dict(os.environ)
    if comparison.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // comparison.jobs)))
    with open(folder / LOG, "wb") as log:
        child = subprocess.Popen(
            argv + ["--resume", AUTO] * resume,
            stdin=subprocess.PIPE,  # by which it sees us end
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # only we pass a Ctrl-C on, once: a second one would keep the run from saving
        )
    return Process(cell, folder, time.monotonic(), child)


def finish(process: Process) -> None:
    """Write the result of a run that has ended. Raises UserError if it neither succeeded nor diverged."""
    log = (process.folder / LOG).read_text(errors="replace")
    diverged = process.code == 1 and DIVERGED in log  # a lost process has the same code
    if process.code != 0 and not diverged:
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
        raise UserError(
            f"the run of {process.cell} ended with exit code {process.code}: {last}; {process.folder / LOG} tells all"
        )
    result = process.cell._asdict() | {"diverged": diverged, "peak_mb": process.peak_mb}
    write_text(process.folder / RESULT, json.dumps(result) + "\n")


def run_cells(
    comparison: Comparison,
    cells: Iterable[Cell],
    sizes: Mapping[str, Size],
    deadline: float,
    say: Callable[[Outcome, float], None],
) -> bool:
    """Run cells, comparison.jobs side by side; -> whether all are complete. A cell starts only if it would end before
    the deadline (of time.monotonic()) when it takes as long as the longest one so far. Runs in progress at the deadline
    are asked to save and stop. say(outcome, seconds) is called at the end of each run. Raises UserError as finish
    does."""
    waiting, running, longest, late = deque(cells), list[Process](), 0.0, False
    try:
        while waiting or running:
            late = late or (bool(waiting) and time.monotonic() + longest > deadline)
            while waiting and not late and len(running) < comparison.jobs:
                cell = waiting.popleft()
                folder = Path(comparison.output) / "runs" / cell.folder
                running.append(start(comparison, cell, sizes[cell.method], folder))
            if not running or time.monotonic() > deadline:
                return False
            time.sleep(POLL)
            for process in [process for process in running if process.poll()]:
                running.remove(process)
                finish(process)
                spent = time.monotonic() - process.began
                longest = max(longest, spent)
                say(read_outcome(process.folder), spent)
        return True
    finally:
        for process in running:
            process.child.send_signal(signal.SIGTERM)
        for process in running:
            process.child.wait()
