"""Runs the checks of a GPU machine, the most important first, each in a process of its own and with a time limit.

    sh scripts/gpu_check.sh [--offline] [--minutes 10] [--only STEP …] [--full] [--list]

A step (STEPS) prints its results: JSON objects, and rows of tables, one in each line. Each is written at once, with the
step's name, to results.jsonl, and everything else to check.log, so that results stay if the machine is taken away. A
step that fails, hangs, runs out of memory or lacks a program stops no other. A summary at the end lists what was
measured, what failed and what was left out, in the order of importance, even if the check itself is stopped. --list
prints the steps with the seconds that each should take. --quick runs all of them on a CPU, with tiny sizes. Needs only
Python.
"""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

from common import NO_GPU, NOT_HERE, OUT_OF_MEMORY, ROOT, Parser, head, row

LEAST, LONGER = 5, 4  # seconds that a step is begun with; how many times as long as expected it may take
SILENT = 1  # seconds without a line after which a command that has ended is over, whoever holds its output
SHOWN = 400  # characters of a result that are printed
PASSED, FAILED, LEFT_OUT = "measured", "failed", "left out"
ENGINE = ("safetensors", "numpy", "tqdm")  # of training on one device
RANKS = ("deepspeed", "lightning")  # and of several, or in stages
SUITE = "test suite"


@dataclass(frozen=True)
class Step:
    """Commands that run one after the other and should take so many seconds, if their programs and modules are
    installed. A word of a command that ends in .py is a program of this folder; --quick leaves out the flags `sizes`. A
    `full` step begins only if its seconds are left; --full has no limit."""

    name: str
    seconds: int
    commands: tuple
    modules: tuple = ()
    programs: tuple = ()
    sizes: tuple = ()
    full: bool = False

    def missing(self):
        """The programs and modules that this machine lacks."""
        invalidate_caches()  # a step installs modules
        programs = [name for name in self.programs if shutil.which(name) is None]
        return programs + [name for name in ("torch", *self.modules) if find_spec(name) is None]

    def named(self, words):
        """True if its name, or the kind that it begins with, is one of the words: "step" means all training steps."""
        return self.name in words or self.name.split()[0] in words


def of_models(part, seconds, modules=()):
    """The Steps of a part of gpu_models.py, one for each generation."""
    return tuple(
        Step(f"{part} {version}", seconds, (("gpu_models.py", part, version),), modules) for version in ("x070", "x060")
    )


def engine(case, seconds, *modules, **others):
    """The Step of a case of gpu_engine.py."""
    name = f"engine {case}" if case.startswith("x0") else case
    return Step(name, seconds, (("gpu_engine.py", case, "--folder", "{folder}"),), (*ENGINE, *modules), **others)


def sanitizing(kernels, *program):
    """The Step that runs a family's kernels under compute-sanitizer's tools, which watch no others. Each tensor has
    memory of its own, so that an access outside it is seen."""
    watched = ("compute-sanitizer", "--error-exitcode", "1", "--kernel-name", f"kns={kernels}")
    commands = tuple(
        ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched, "--tool", tool, sys.executable, *program)
        for tool in ("memcheck", "racecheck", "synccheck")
    )
    return Step(f"sanitizer {kernels}", 40, commands, programs=("compute-sanitizer",), full=True)


SMALL = ("--methods", "bat-in", "--tokens", "200", "--repeats", "1")
EIGHT = ("--rows", "8x4096")
MORE_ROWS = (("none", "--rows", "1x1024"), ("bat-in", "--dtype", "fp32", "--rows", "1x1024"))
BESIDE = ("--accelerator", "gpu", "--dtypes", "bf16", "--channels", "1024", "--layers", "12")
SERVED = ("--layers", "12", "--channels", "1024", "--clients", "1", "64", "--rounds", "1")
STEPS = (
    # If these fail, nothing else is worth its time.
    Step("card", 10, (("gpu_kernels.py", "card"),)),
    Step("build", 45, (("gpu_kernels.py", "build"),)),
    *of_models("smoke", 20),
    # People train these.
    *(
        Step(f"step {version} {method}", 12, (("gpu_models.py", "step", version, "--methods", method),))
        for version in ("x070", "x060")
        for method in ("bat-in", "bone", "lora")
    ),
    engine("x070", 40),
    engine("x060", 40),
    Step("kernels", 30, (("gpu_kernels.py", "time"),)),
    Step("step x070 of 8 rows", 15, (("gpu_models.py", "step", "x070", "--methods", "bat-in"),), sizes=EIGHT),
    engine("two GPUs", 35, *RANKS),
    engine("a rank that raises", 20, *RANKS),
    engine("stage 3", 20, *RANKS),
    Step("above 2^31", 15, (("gpu_kernels.py", "above"),)),
    engine("RWKV-7a", 15),
    engine("host memory", 20),
    *of_models("decode", 20, ("numpy",)),
    Step("top_p", 10, (("gpu_kernels.py", "draw"),)),
    engine("rewards", 40),
    Step("serve", 20, (("serve.py", "--alone"),), ("numpy", "fastapi", "uvicorn"), sizes=SERVED),
    engine("nf4", 15, "bitsandbytes"),
    engine("large", 35),
    # The rest follows while minutes last.
    engine("compile", 30, full=True),
    Step("engine beside a bare loop", 20, (("trainer.py", "--methods", "bat-in"),), ENGINE, sizes=BESIDE, full=True),
    Step("every operation", 60, (("gpu_kernels.py", "check"),), full=True),
    *(
        Step(
            f"profile {version}",
            15,
            (("gpu_models.py", "step", version, "--profile", "30"),),
            sizes=("--methods", "bat-in", "--rows", "1x4096"),
            full=True,
        )
        for version in ("x070", "x060")
    ),
    *(engine(case, 20, full=True) for case in ("grad_cp", "infctx", "fp32")),
    *(engine(case, 20, *RANKS, full=True) for case in ("stage 2 offload", "stage 3 offload")),
    engine("int8", 20, "bitsandbytes", full=True),
    Step(
        "step x060 of 8 rows", 15, (("gpu_models.py", "step", "x060", "--methods", "bat-in"),), sizes=EIGHT, full=True
    ),
    *(
        Step(
            f"more {version} {' '.join(flags)}",
            15,
            (("gpu_models.py", "step", version, "--methods", *flags),),
            full=True,
        )
        for version in ("x070", "x060")
        for flags in MORE_ROWS
    ),
    *(sanitizing(name, "gpu_models.py", "smoke", f"x0{name[3]}0", *SMALL) for name in ("wkv7", "wkv6")),
    *(
        sanitizing(name, "gpu_kernels.py", "check", "--repeats", "1")
        for name in ("mix", "bone", "cross_entropy", "decode")
    ),
    Step(
        SUITE, 1800, (("-m", "pytest", "-q", "tests", "--accelerator", "gpu"),), ("pytest", *ENGINE, *RANKS), full=True
    ),
)
# Unless --offline, this installs what the steps behind it lack.
PACKAGES = Step("packages", 20, (("sh", str(ROOT / "scripts" / "setup.sh"), "test"),))
BEFORE = "serve"


def command_of(step, words, folder, quick):
    """The command of some words of a step: of a program of this folder, of a flag of Python, or of another program."""
    known = {"{folder}": str(folder), **{path.name: str(path) for path in (ROOT / "benchmarks").glob("*.py")}}
    python = [sys.executable] if words[0] in known or words[0] == "-m" else []
    return [*python, *(known.get(word, word) for word in words), *(["--quick"] if quick else step.sizes)]


class Results:
    """results.jsonl: one JSON object in each line, on disk as soon as it is known."""

    def __init__(self, folder):
        self._file = open(folder / "results.jsonl", "w", encoding="utf-8")

    def add(self, /, **entry):  # an entry may have any key
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class Check:
    """Runs steps in a folder, which takes their bases and runs; outcomes: {name: (PASSED, FAILED or LEFT_OUT, why)}."""

    def __init__(self, folder, log, results, quick=False):
        self.folder, self.log, self.results, self.quick = folder, log, results, quick
        self.outcomes = {}

    def run_all(self, steps, minutes):
        """Run Steps -> an exit code."""
        began = time.monotonic()
        for step in steps:
            left = 60 * minutes - (time.monotonic() - began)
            start, code = time.monotonic(), 0
            if missing := step.missing():
                kind, why = LEFT_OUT, f"no {', '.join(missing)}"
            elif left < LEAST:
                kind, why = LEFT_OUT, f"{minutes:g} minutes are over"
            elif step.full and left < step.seconds:
                kind, why = LEFT_OUT, f"it needs {step.seconds} s, and {left:.0f} of {minutes:g} minutes are left"
            else:
                print(f"{step.name} …", flush=True)
                self.outcomes[step.name] = FAILED, "interrupted"
                kind, why, code = self.run(step, left if self.quick else min(LONGER * step.seconds, left))
            self.outcomes[step.name] = kind, why
            seconds = round(time.monotonic() - start, 1)
            self.results.add(step=step.name, outcome=kind, why=why, seconds=seconds, expected=step.seconds)
            print(f"{step.name:<28} {seconds:7.1f} s  {kind}{': ' * bool(why)}{why}", flush=True)
            if step.name == "card" and (code == NO_GPU or missing):
                print("run this on a machine with an NVIDIA GPU and a CUDA build of torch")
                return NO_GPU
        return int(any(kind == FAILED for kind, _ in self.outcomes.values()))

    def run(self, step, seconds):
        """Run a Step for at most so many seconds -> (PASSED, FAILED or LEFT_OUT, why, the last command's exit code)."""
        until, code = time.monotonic() + seconds, 0
        for words in step.commands:
            command = command_of(step, words, self.folder, self.quick)
            print(f"{step.name}: $ {' '.join(command)}", file=self.log, flush=True)
            code, last = self.run_command(command, until - time.monotonic(), step.name)
            if code is None:
                return FAILED, f"stopped after {seconds:.0f} s", code
            if code == NOT_HERE:
                return LEFT_OUT, "this machine cannot", code
            if code == OUT_OF_MEMORY:
                return FAILED, "out of memory", code
            if code != 0:
                return FAILED, f"exit code {code}{', ' * bool(last)}{last}", code
        return PASSED, "", code

    def run_command(self, command, seconds, name):
        """(the exit code of one command, None if its time ran out; the last line that begins with "error: ")."""
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="backslashreplace")
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
        until, last = time.monotonic() + seconds, ""
        try:
            for line in lines_until(process, until):
                self.log.write(line)
                self.log.flush()
                last = line.strip() if line.startswith("error: ") else last
                if (entry := result_of(line)) is not None:
                    self.results.add(step=name, **entry)
                    print(f"    {line.rstrip()[:SHOWN]}", flush=True)
            code = process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # also what the command has started and left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code, last


def lines_until(process, until):
    """Yield the lines of a process until it closes its output, until another keeps it open behind the process's end and
    is silent, or until that time."""
    lines = queue.SimpleQueue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (left := until - time.monotonic()) > 0:
        ended = process.poll() is not None
        with suppress(queue.Empty):
            if (line := lines.get(timeout=min(left, SILENT))) is None:
                return
            yield line
            continue
        if ended:
            return


def result_of(line):
    """The result that a line is: its JSON object, or {"row": text} of a table; an object with the key of the step's
    name as {"result": object}; or None."""
    if line.startswith("| "):
        return {"row": line.strip()}
    try:
        found = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return {"result": found} if found and "step" in found else found


def table(steps):
    """Print the steps with their expected seconds and what they need."""
    head("step", "seconds", "needs besides torch")
    for step in steps:
        needs = [*step.programs, *(("requirements.txt",) if set(ENGINE) <= set(step.modules) else ())]
        needs += [name for name in step.modules if name not in (*ENGINE, *RANKS) or "requirements.txt" not in needs]
        row(step.name, step.seconds, ", ".join(needs))
    row("in all", sum(step.seconds for step in steps), "")


def summary(steps, outcomes):
    """Lines with the outcome of each Step, by kind and in the order of importance."""
    for kind in (PASSED, FAILED, LEFT_OUT):
        names = [step.name for step in steps if outcomes.get(step.name, (LEFT_OUT,))[0] == kind]
        yield f"{kind}: {len(names)} of {len(steps)}"
        for name in names:
            why = outcomes.get(name, (LEFT_OUT, "the check was stopped"))[1]
            yield f"    {name}{': ' * bool(why)}{why}"


def chosen(args, parser):
    """The Steps that the flags ask for, in order."""
    short = args.quick or args.list
    known = [step for step in STEPS if not (step.full and short) or args.full or step.named(args.only or ())]
    if not (args.offline or args.quick):
        known.insert([step.name for step in known].index(BEFORE), PACKAGES)
    if unknown := [word for word in args.only or () if not any(step.named([word]) for step in known)]:
        parser.error(f"--only {' '.join(unknown)}: the steps are {', '.join(step.name for step in STEPS)}")
    return [step for step in known if not args.only or step.named(args.only)]


def main(argv=None):
    parser = Parser(__doc__, minutes=60, output=None)
    parser.add_argument("--offline", action="store_true", help="the python at hand, nothing installed")
    parser.add_argument("--full", action="store_true", help="all steps and the whole test suite, however long")
    parser.add_argument("--minutes", type=float, default=10, help="no step goes on after so many, but with --full")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "gpu_check", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="STEP", help='these alone, or those of a kind, such as "engine"')
    parser.add_argument("--list", action="store_true", help="the steps and their expected seconds")
    args = parser.parse_args(argv)
    steps = chosen(args, parser)
    table(steps)
    if args.list:
        return 0
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_check-")))  # bases and runs
        output = args.output or work / "results"
        output.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(open(output / "check.log", "w", encoding="utf-8"))
        check = Check(work, log, Results(output), args.quick)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the summary is printed
        try:
            return check.run_all(steps, float("inf") if args.full else args.minutes)
        finally:
            lines = summary(steps, check.outcomes)
            print(*lines, f"results.jsonl and check.log: {output}", sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
