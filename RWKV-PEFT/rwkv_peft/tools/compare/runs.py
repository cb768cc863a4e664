"""The runs of a comparison: each is a process of train.py in a folder of its own, with an outcome; and the record of
the settings that they share.

    rwkv_peft.tools.compare.runs [flags of train.py]      is such a process; when the comparison is killed, it saves
                                                          and stops
"""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ...checkpoints.atomic import write_text
from ...checkpoints.digest import digest_below, digest_of
from ...checkpoints.lock import alone_in
from ...checkpoints.readable import read_settings
from ...children import python_command, when_parent_ends
from ...cli.errors import UNREADABLE, UserError, exit_on_user_error
from ...data.recorded import ENDINGS, binidx_prefix
from ...plots import metrics_of, read_metrics, series
from ...training.flags.request import parse_flags
from ...training.saving.checkpoints import DIVERGED, find_checkpoint
from ...training.saving.resume import AUTO
from .flags import Comparison, method_flags
from .sweep import Cell, Size, rate_of

RESULT, LOG, RECORD = "result.json", "log.txt", "compare.json"


class Outcome(NamedTuple):
    """A complete run: loss is the last validation's, infinite if the run diverged; validations are (steps done, loss);
    step_ms is the median time of a step; peak_mb the largest resident memory of the process (10^6 bytes); retained the
    losses on --retain_data, before the first step and at each validation, () without the flag."""

    cell: Cell
    loss: float
    validations: tuple[tuple[int, float], ...]
    step_ms: float
    peak_mb: float
    retained: tuple[float, ...] = ()


def read_outcome(folder: Path) -> Outcome:
    """The Outcome of the complete run in a folder. Raises UserError if its files are damaged."""
    result, metrics = read_settings(folder / RESULT), metrics_of(folder)
    records = read_metrics(metrics) if metrics.is_file() else []
    try:
        cell = Cell(result["method"], result["rate"], result["seed"])
        if cell.folder != folder.name:
            raise ValueError("another run's")
        # tokens_per_s is rounded to 0.1 and may read 0
        seconds = [record["tokens"] / max(record["tokens_per_s"], 0.1) for record in records if "tokens" in record]
        validations = tuple((done, float(loss)) for done, loss in zip(*series(records, "val_loss")))
        loss = math.inf if result["diverged"] else validations[-1][1]
        return Outcome(
            cell,
            loss if math.isfinite(loss) else math.inf,
            validations,
            1e3 * statistics.median(seconds) if seconds else math.nan,
            float(result["peak_mb"]),
            tuple(float(loss) for name in ("retain_start", "retain_loss") for loss in series(records, name)[1]),
        )
    except UNREADABLE as error:
        raise UserError(
            f"{folder}: {RESULT} and metrics.jsonl are not those of the complete run that its name tells; remove the "
            "folder, and the same command runs it again"
        ) from error


def check_record(folder: Path, comparison: Comparison, parameters: int, fingerprint: str) -> None:
    """Write the settings that all runs of the folder share; once a run has saved anything, compare with those written
    instead. Raises UserError if they differ."""
    path = folder / RECORD
    now = {
        "train": list(comparison.train),
        "steps": comparison.steps,
        "val_every": comparison.val_every,
        "lr_final": comparison.lr_final,
        "trained": parameters,
        "base": fingerprint,
        "files": digest_of_data(comparison),
    }
    begun = any((run / RESULT).exists() or find_checkpoint(run) for run in (folder / "runs").glob("*"))
    if not path.exists() or not begun:
        write_text(path, json.dumps(now, indent=2) + "\n")
        return
    before = read_settings(path)
    for name, value in now.items():
        if before.get(name, value) != value:  # earlier versions recorded less
            raise UserError(
                f"--output {folder} holds a comparison of other settings ({name}: {before[name]}, and now "
                f"{value}); give another folder, or the same settings"
            )


def digest_of_data(comparison: Comparison) -> str:
    """The digests of the files that the runs train and validate on, as they are on the disk now."""
    flags = parse_flags([*comparison.train, "--proj_dir", comparison.output])
    data, train = flags.data, flags.train
    paths = filter(None, (*data.files, train.val_data, *train.more_val, train.retain_data))
    digests = (digest_below(path) or "".join(digest_of(binidx_prefix(path) + end) for end in ENDINGS) for path in paths)
    return " ".join(digests)


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


def run_cell(comparison: Comparison, cell: Cell, size: Size) -> Outcome:
    """Run a cell, or resume it from its checkpoint, even one of its last step, because the end of the run may still
    have work to do. An interrupt has it save and stop. Raises UserError if it neither succeeds nor diverges."""
    folder = Path(comparison.output) / "runs" / cell.folder
    resume = find_checkpoint(folder) is not None
    if folder.exists() and not resume:
        with alone_in(folder):  # a run may still work in it if its comparison was killed
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    argv = python_command(__name__, *train_flags(comparison, cell, size, folder))
    with open(folder / LOG, "wb") as log:
        child = subprocess.Popen(
            argv + ["--resume", AUTO] * resume,
            stdin=subprocess.PIPE,  # which ends with this process, and shows the run that it has
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # only we pass a Ctrl-C on, once: a second one would keep the run from saving
        )
    if sys.platform == "win32":
        raise NotImplementedError
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    child.returncode = os.waitstatus_to_exitcode(status)
    finish(cell, folder, child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)
    return read_outcome(folder)


def finish(cell: Cell, folder: Path, code: int, peak_mb: float) -> None:
    """Write the result of a run that has ended. Raises UserError if it neither succeeded nor diverged."""
    log = (folder / LOG).read_text(errors="replace")
    diverged = code == 1 and DIVERGED in log  # a lost process has the same code
    if code != 0 and not diverged:
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
        raise UserError(f"the run of {cell} ended with exit code {code}: {last}; see {folder / LOG}")
    write_text(folder / RESULT, json.dumps(cell._asdict() | {"diverged": diverged, "peak_mb": peak_mb}) + "\n")


if __name__ == "__main__":
    when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    from ...training.run import main

    exit_on_user_error(main)
