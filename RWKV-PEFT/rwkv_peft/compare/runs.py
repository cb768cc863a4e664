"""The runs of a comparison as processes of train.py, each in a folder of its own, and what has become of them."""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..files.alone import alone_in
from ..files.atomic import atomic_write
from ..names import METRICS
from ..plots import is_number, read_metrics
from ..training.checkpoints import DIVERGED, find_checkpoint
from ..training.resume import AUTO
from .flags import Comparison, method_flags
from .plan import Cell
from .rates import rate_of
from .sizes import Size

RESULT, LOG = "result.json", "log.txt"
POLL = 0.1  # seconds between looks at the processes


class Outcome(NamedTuple):
    """A complete run: loss is the last validation's, infinite where it diverged; validations are (steps done, seconds
    of training, loss); step_ms is the median of a step, peak_mb the largest resident memory of the process (10^6
    bytes); retained the losses on --retain_data, before the first step and at each of validations, () without it."""

    cell: Cell
    loss: float
    validations: tuple[tuple[int, float, float], ...]
    step_ms: float
    peak_mb: float
    retained: tuple[float, ...] = ()


@dataclass
class Process:
    """A run that goes on; its exit code and peak memory when it has ended."""

    cell: Cell
    folder: Path
    began: float
    child: subprocess.Popen[bytes]
    code: int | None = None
    peak_mb: float = field(default=math.nan)

    def poll(self) -> bool:
        """Whether it has ended."""
        pid, status, usage = os.wait4(self.child.pid, os.WNOHANG)
        if pid:
            self.code = self.child.returncode = os.waitstatus_to_exitcode(status)
            self.peak_mb = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        return self.code is not None


def any_begun(folder: Path) -> bool:
    """Whether a run of the comparison in a folder is complete, or has saved a checkpoint."""
    return any((run / RESULT).exists() or find_checkpoint(run) for run in (folder / "runs").glob("*"))


def read_outcome(folder: Path) -> Outcome:
    """The Outcome of the complete run in a folder."""
    result = json.loads((folder / RESULT).read_text())
    records = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    seconds = [record["tokens"] / max(record["tokens_per_s"], 0.1) for record in records]  # 0.1: it is rounded so
    validations = tuple(
        (record["step"] + 1, spent, record["val_loss"])
        for record, spent in zip(records, accumulate(seconds))
        if is_number(record.get("val_loss"))
    )
    loss = validations[-1][2] if validations and not result["diverged"] else math.inf
    return Outcome(
        Cell(result["method"], result["rate"], result["seed"]),
        loss if math.isfinite(loss) else math.inf,
        validations,
        1e3 * statistics.median(seconds) if seconds else math.nan,
        result["peak_mb"],
        tuple(record[name] for record in records for name in ("retain_start", "retain_loss") if name in record),
    )


def train_flags(comparison: Comparison, cell: Cell, size: Size, folder: Path) -> list[str]:
    """The flags of train.py of one run."""
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
    """Begin a run, or go on with one that stopped at a checkpoint, if only for what its end would still have done."""
    resume = find_checkpoint(folder) is not None
    if folder.exists() and not resume:
        with alone_in(folder):  # a run whose comparison was killed may go on in it
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", __package__.split(".")[0], "train", *train_flags(comparison, cell, size, folder)]
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if comparison.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // comparison.jobs)))
    with open(folder / LOG, "wb") as log:
        child = subprocess.Popen(
            argv + ["--resume", AUTO] * resume,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C is ours to pass on, once: a second one would keep it from saving
        )
    return Process(cell, folder, time.monotonic(), child)


def finish(process: Process) -> None:
    """Note how a run ended. Raises UserError where it neither ended well nor diverged."""
    log = (process.folder / LOG).read_text(errors="replace")
    diverged = process.code == 1 and DIVERGED in log  # and not lost, which has the same code
    if process.code != 0 and not diverged:
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
        raise UserError(
            f"the run of {process.cell} ended with exit code {process.code}: {last}; {process.folder / LOG} tells all"
        )
    with atomic_write(process.folder / RESULT) as temporary:
        result = process.cell._asdict() | {"diverged": diverged, "peak_mb": process.peak_mb}
        temporary.write_text(json.dumps(result) + "\n")


def run_cells(
    comparison: Comparison,
    cells: Iterable[Cell],
    sizes: Mapping[str, Size],
    deadline: float,
    say: Callable[[Outcome, float], None],
) -> bool:
    """Run cells, as many side by side as the comparison says; whether all are complete. None starts that would not end
    before the deadline (of time.monotonic()) if it took as long as the longest one did, and what goes on then is asked
    to save and stop. say(outcome, seconds) is called at the end of each. Raises UserError as finish does."""
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
