"""Running train.py as a process of its own, and reading what it wrote."""

import json
import os
import subprocess
from pathlib import Path

from warm import Command

ROOT = Path(__file__).resolve().parents[2]


def start(argv, cold=False, **variables):
    """A command under way; cold: in an interpreter that begins with it, and with pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    if cold or "gpu" in argv:  # what is forked cannot use a GPU that was looked at before
        return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    return Command(argv, environment)


def finish(process, code=0):
    out, err = process.communicate(timeout=480)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def metrics(files, name):
    return [json.loads(line) for line in (files / name / "metrics.jsonl").read_text().splitlines()]


class Planted:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
