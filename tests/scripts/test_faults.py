"""benchmarks/faults.py in small: writers killed at random and at file operations, two at once, a full disk if one can
be mounted, some broken and hostile files. tests/training covers killed and attacked runs."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


def test_killed_racing_and_refused_writers_leave_what_they_should(warm_python):
    counts = ("--kills", "6", "--operations", "12", "--races", "6", "--mutants", "35", "--attacks", "25", "--seed", "3")
    command = [warm_python, SCRIPT, *counts, "--saves", "0", "--resumes", "0", "--disks", "0", "--ends", "0"]
    command += ["--sleeps", "0"]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("| 0 |")]
    assert len(rows) == 6 + 10 and "broken files, 0 faults" in done.stdout
    assert all(int(row.split("|")[3]) for row in rows[:6])  # each was killed at an operation
    assert all(int(row.split("|")[2]) for row in rows[6:])  # and of each kind of attack some was tried
