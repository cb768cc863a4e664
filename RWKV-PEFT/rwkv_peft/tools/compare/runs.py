"""The runs of a comparison: processes of train.py in folders of their own, their outcomes, and the record of the
settings that they share.

    rwkv_peft.tools.compare.runs [flags of train.py]      is such a process; when the comparison is killed, it saves
                                                          and stops
"""

import hashlib
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
from typing import Any, NamedTuple

from ...checkpoints.atomic import write_text
from ...checkpoints.lock import alone_in
from ...checkpoints.readable import read_settings, require_readable
from ...children import python_command, when_parent_ends
from ...cli.errors import UNREADABLE, UserError, exit_on_user_error, quoted
from ...cli.names import is_number
from ...data.recorded import ENDINGS, prefixes_of
from ...plots import metrics_of, read_metrics
from ...training.flags.request import parse_flags
from ...training.saving.checkpoints import DIVERGED, find_checkpoint
from ...training.saving.resume import AUTO
from .flags import Comparison, method_flags
from .plan import Cell, Size, rate_of

RESULT, LOG, RECORD = "result.json", "log.txt", "compare.json"
REMEDY = "remove the folder of that run, which the same command then runs again"
POLL = 0.1  # seconds between looks at the processes
BLOCK, BLOCKS = 1 << 16, 64  # bytes of a sample of a file, and about how many samples


class Outcome(NamedTuple):
    """A complete run: loss is the last validation's, infinite if the run diverged; validations are (steps done, seconds
    of training, loss); step_ms is the median time of a step; peak_mb the largest resident memory of the process (10^6
    bytes); retained the losses on --retain_data, before the first step and at each validation, () without the flag."""

    cell: Cell
    loss: float
    validations: tuple[tuple[int, float, float], ...]
    step_ms: float
    peak_mb: float
    retained: tuple[float, ...] = ()


def read_outcome(folder: Path) -> Outcome:
    """The Outcome of the complete run in a folder. Raises UserError if its files are damaged."""
    path = require_readable(folder / RESULT, f"{folder / RESULT}: no such file", again=True)
    result, metrics = read_settings(path), metrics_of(folder)
    try:
        cell = Cell(result["method"], result["rate"], result["seed"])
        matches = cell.folder == folder.name
    except UNREADABLE:
        matches = False
    if not matches:
        raise UserError(f"{path} is not the result of the run that its folder names; {REMEDY}")
    diverged, peak_mb = result.get("diverged") is True, number(result, "peak_mb", path)
    records = read_metrics(metrics) if metrics.is_file() else []
    # tokens_per_s is rounded to 0.1 and may read 0
    seconds = [number(each, "tokens", metrics) / max(number(each, "tokens_per_s", metrics), 0.1) for each in records]
    validations = tuple(
        (record["step"] + 1, spent, number(record, "val_loss", metrics))
        for record, spent in zip(records, accumulate(seconds))
        if record.get("val_loss") is not None
    )
    if not validations and not diverged:
        raise UserError(f"{metrics}: no validation loss, and {RESULT} beside it is of a complete run; {REMEDY}")
    loss = math.inf if diverged else validations[-1][2]
    names = ("retain_start", "retain_loss")
    return Outcome(
        cell,
        loss if math.isfinite(loss) else math.inf,
        validations,
        1e3 * statistics.median(seconds) if seconds else math.nan,
        peak_mb,
        tuple(number(record, name, metrics) for record in records for name in names if name in record),
    )


def number(record: Mapping[str, Any], name: str, path: Path) -> float:
    """A record's number under a name, NaN and infinity included. Raises UserError for any other value."""
    value = record.get(name)
    if not is_number(value):
        raise UserError(f"{path}: {name} is {quoted(value)}, and a number is due; {REMEDY}")
    return float(value)


def check_record(folder: Path, comparison: Comparison, parameters: int, fingerprint: str) -> None:
    """Write the settings that all runs of the folder share; once a run has saved anything, compare with those written
    instead. Raises UserError if they differ."""
    path = folder / RECORD
    now = {
        "train": list(comparison.train),
        "steps": comparison.steps,
        "val_every": comparison.val_every,
        "lr_final": comparison.lr_final,
        "parameters": parameters,
        "base": fingerprint,
        "data": data_of(comparison),
    }
    if not path.exists() or not any_begun(folder):
        write_text(path, json.dumps(now, indent=2) + "\n")
        return
    before = {"data": now["data"]} | read_settings(path)  # earlier versions did not record it
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"--output {folder} holds a comparison of other settings ({name}: {before.get(name)}, and now "
                f"{value}); give another folder, or the same settings"
            )


def data_of(comparison: Comparison) -> str:
    """A hash of samples of the files that the runs train and validate on, as they are on the disk now."""
    flags = parse_flags([*comparison.train, "--proj_dir", comparison.output])
    digest = hashlib.sha256()
    data, train = flags.data, flags.train
    for path in filter(None, (data.path, *data.more, train.val_data, *train.more_val, train.retain_data)):
        within = sorted(Path(path).rglob("*")) if os.path.isdir(path) else ()
        for file in (Path(path), *(Path(prefix + end) for prefix in prefixes_of(path) for end in ENDINGS), *within):
            if file.is_file():
                digest.update(file.name.encode() + sample_of(file))
    return digest.hexdigest()[:16]


def sample_of(file: Path) -> bytes:
    """A file's size and samples of its content; all of it if it is small."""
    size = file.stat().st_size
    found = [str(size).encode()]
    with open(file, "rb") as content:
        for start in range(0, size, max(BLOCK, size // BLOCKS)):
            content.seek(start)
            found.append(content.read(BLOCK))
    return b"".join(found)


def any_begun(folder: Path) -> bool:
    """True if a run of the comparison in a folder is complete or has saved a checkpoint."""
    return any((run / RESULT).exists() or find_checkpoint(run) for run in (folder / "runs").glob("*"))


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
        """True if the process has ended; its exit code and peak memory are known then."""
        pid, status, usage = os.wait4(self.child.pid, os.WNOHANG)
        if pid:
            self.code = self.child.returncode = os.waitstatus_to_exitcode(status)
            self.peak_mb = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        return self.code is not None


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
    few = ("--answer_rows", "0")  # nobody reads the answers, unless the flag is given
    return [*few, *comparison.train, *method_flags(cell.method, size.rank, size.mini_rank), *words]


def start(comparison: Comparison, cell: Cell, size: Size, folder: Path) -> Process:
    """Start a run, or resume one that has a checkpoint, even one of its last step, because the end of the run may still
    have work to do."""
    resume = find_checkpoint(folder) is not None
    if folder.exists() and not resume:
        with alone_in(folder):  # a run may still work in it if its comparison was killed
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    argv = python_command(__name__, *train_flags(comparison, cell, size, folder))
    environment = dict(os.environ)
    if comparison.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // comparison.jobs)))
    with open(folder / LOG, "wb") as log:
        child = subprocess.Popen(
            argv + ["--resume", AUTO] * resume,
            stdin=subprocess.PIPE,  # which ends with this process, and shows the run that it has
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
            f"the run of {process.cell} ended with exit code {process.code}: {last}; see {process.folder / LOG}"
        )
    result = process.cell._asdict() | {"diverged": diverged, "peak_mb": process.peak_mb}
    write_text(process.folder / RESULT, json.dumps(result) + "\n")


def run_cells(
    comparison: Comparison,
    cells: Iterable[Cell],
    sizes: Mapping[str, Size],
    deadline: float,
    report: Callable[[Outcome, float], None],
) -> bool:
    """Run cells, comparison.jobs side by side -> True if all are complete. Raises UserError as finish does.

    A cell starts only if it would end before the deadline (of time.monotonic()) when it takes as long as the longest
    one so far. Runs in progress at the deadline save and stop. report(outcome, seconds) is called at the end of each.
    """
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
                report(read_outcome(process.folder), spent)
        return True
    finally:
        for process in running:
            process.child.send_signal(signal.SIGTERM)
        for process in running:
            process.child.wait()


if __name__ == "__main__":
    when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    from ...training.run import main

    exit_on_user_error(main)
