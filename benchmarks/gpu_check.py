"""Runs the checks of a GPU machine, the most important first, each in a process of its own and with a time limit.

    sh scripts/gpu_check.sh [--offline] [--wheels FOLDER] [--full] [--minutes 10] [--only STEP …]

A step (gpu_check_steps.py) prints its results, a JSON object in each line. Each is written at once, with the step's
name, to results.jsonl, and everything else to check.log, so that results stay if the machine is taken away. A step that
fails, hangs, runs out of memory or lacks a program stops no other. A summary at the end lists what was measured, what
failed and what was left out, in the order of importance, even if the check itself is stopped. Needs only Python.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from common import Parser
from gpu_check_steps import NOT_HERE, OUT_OF_MEMORY, ROOT, steps

NO_GPU = 2  # the exit code of the first step where there is none
LEAST = 5  # seconds that a step is begun with
SHOWN = 400  # characters of a result that are printed
PASSED, FAILED, LEFT_OUT = "measured", "failed", "left out"


class Results:
    """results.jsonl: one JSON object in each line, on disk as soon as it is known."""

    def __init__(self, folder):
        self._file = open(folder / "results.jsonl", "w", encoding="utf-8")

    def add(self, **entry):
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def run(step, seconds, log, results):
    """Run a Step for at most so many seconds -> (PASSED, FAILED or LEFT_OUT, why, the last command's exit code)."""
    until, code = time.monotonic() + seconds, 0
    for command in step.commands:
        log.write(f"{step.name}: $ {' '.join(command)}\n")
        log.flush()
        code = run_command(command, until - time.monotonic(), step.name, log, results)
        if code is None:
            return FAILED, f"stopped after {seconds:.0f} s", code
        if code == NOT_HERE:
            return LEFT_OUT, "this machine cannot", code
        if code == OUT_OF_MEMORY:
            return FAILED, "out of memory", code
        if code != 0:
            return FAILED, f"exit code {code}", code
    return PASSED, "", code


def run_command(command, seconds, name, log, results):
    """The exit code of one command, None if its time ran out."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    late = threading.Event()

    def end():
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(seconds, 0), end)
    timer.start()
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            if (entry := as_object(line)) is not None:
                results.add(step=name, **entry)
                print(f"    {line.rstrip()[:SHOWN]}", flush=True)
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    return None if late.is_set() else code


def as_object(line):
    """A line's JSON object, or None."""
    if not line.startswith("{"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def check(chosen, minutes, log, results, outcomes):
    """Run the Steps, and put {name: (PASSED, FAILED or LEFT_OUT, why)} into `outcomes` -> an exit code."""
    began, bad = time.monotonic(), False
    for step in chosen:
        suite = step.name == "suite"
        left = 60 * minutes - (time.monotonic() - began)
        start, code = time.monotonic(), 0
        if missing := step.missing():
            kind, why = LEFT_OUT, f"no {', '.join(missing)}"
        elif left < LEAST and not suite:
            kind, why = LEFT_OUT, f"{minutes:g} minutes are over"
        else:
            print(f"{step.name} …", flush=True)
            outcomes[step.name] = FAILED, "interrupted"
            kind, why, code = run(step, step.seconds if suite else min(step.seconds, left), log, results)
        outcomes[step.name] = kind, why
        seconds = round(time.monotonic() - start, 1)
        results.add(step=step.name, outcome=kind, why=why, seconds=seconds)
        print(f"{step.name:<24} {seconds:7.1f} s  {kind}{': ' * bool(why)}{why}", flush=True)
        if step.name == "card" and (code == NO_GPU or missing):
            print("run this on a machine with an NVIDIA GPU and a CUDA build of torch")
            return NO_GPU
        bad |= kind == FAILED
    return int(bad)


def summary(chosen, outcomes):
    """Lines with the outcome of each Step, by kind and in the order of importance."""
    for kind in (PASSED, FAILED, LEFT_OUT):
        names = [step.name for step in chosen if outcomes.get(step.name, (LEFT_OUT,))[0] == kind]
        yield f"{kind}: {len(names)} of {len(chosen)}"
        for name in names:
            why = outcomes.get(name, (LEFT_OUT, "the check was stopped"))[1]
            yield f"    {name}{': ' * bool(why)}{why}"


def main(argv=None):
    parser = Parser(__doc__, only=("card",), minutes=1, output=None)
    parser.add_argument("--offline", action="store_true", help="the python at hand, nothing installed")
    parser.add_argument("--wheels", metavar="FOLDER", help="where wheels are installed from")
    parser.add_argument("--full", action="store_true", help="the whole test suite as well")
    parser.add_argument("--minutes", type=float, default=10, help="no step but --full's goes on after so many")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "gpu_check", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="STEP", help='these alone, or those of a kind, such as "engine"')
    args = parser.parse_args(argv)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_check-")))  # bases, runs, drivers
        known = steps(work, args.full, offline=args.offline or bool(args.wheels))
        if unknown := [word for word in args.only or () if not any(step.named([word]) for step in known)]:
            parser.error(f"--only {' '.join(unknown)}: the steps are {', '.join(step.name for step in known)}")
        chosen = [step for step in known if not args.only or step.named(args.only)]
        args.output = args.output or work / "results"
        args.output.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(open(args.output / "check.log", "w", encoding="utf-8"))
        results, outcomes = Results(args.output), {}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the summary is told
        try:
            return check(chosen, args.minutes, log, results, outcomes)
        finally:
            print(*summary(chosen, outcomes), f"results.jsonl and check.log: {args.output}", sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
