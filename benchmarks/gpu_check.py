"""Runs the checks of a GPU machine in the order of what they tell, each in a process of its own, within a time.

    sh scripts/gpu_check.sh [--offline] [--wheels FOLDER] [--full] [--minutes 10] [--only STEP …]

A step prints what it finds, a JSON object a line; each is written at once, with the step's name, to results.jsonl, and
all else to STEP.log, so that a machine that is taken away leaves what was known by then. A step that outlasts its time
is ended, one whose programs or modules are missing is skipped, and neither stops the next. Needs Python alone.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBE = (sys.executable, str(ROOT / "benchmarks" / "gpu_probe.py"))
NO_GPU = 2  # the exit code of the first step where there is none
ENGINE = ("deepspeed", "lightning", "safetensors")


@dataclass(frozen=True)
class Step:
    """Commands that run one after the other, for `seconds` at most, where programs and modules are there."""

    name: str
    seconds: int
    commands: tuple
    programs: tuple = ()
    modules: tuple = ()

    def missing(self):
        """The programs and modules that this machine lacks."""
        return [name for name in self.programs if shutil.which(name) is None] + [
            name for name in self.modules if find_spec(name) is None
        ]


def steps(folder, full):
    """The Steps, in order; `folder` takes what they write."""
    step_py = (sys.executable, str(ROOT / "benchmarks" / "step.py"), "--shapes", "2048x7168x24", "--dtypes", "bf16")
    once = (*PROBE, "once")
    tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    found = [
        Step("card", 60, ((*PROBE, "card"),), modules=("torch",)),
        Step("build", 120, ((*PROBE, "build"),)),
        Step("smoke", 60, ((*PROBE, "smoke"),)),
        Step("kernels", 90, ((*PROBE, "kernels"),)),
        Step("ncu", 90, (("ncu", "--set", "basic", "--kernel-name", "regex:wkv", *once),), programs=("ncu",)),
        *(
            Step(
                f"step {batch} x {tokens}",
                90,
                ((*step_py, "--batch", str(batch), "--tokens", str(tokens), "--rounds", "3", "--profile", "30"),),
            )
            for batch, tokens in ((1, 1024), (1, 4096), (8, 4096))
        ),
        Step("graphs", 180, ((sys.executable, str(ROOT / "benchmarks" / "gpu_graphs.py")),), modules=("torch",)),
        Step("train", 120, training(folder), modules=ENGINE),
        Step("ops", 120, ((*tests, "tests/ops", "-k", "cuda or gpu"),), modules=("pytest", "hypothesis")),
        Step("sanitizer", 180, sanitizing(str(folder / "driver")), programs=("nvcc", "compute-sanitizer")),
    ]
    if full:
        found.append(Step("suite", 3600, ((*tests, "tests", "--accelerator", "gpu"),), modules=("pytest", *ENGINE)))
    return found


def sanitizing(driver):
    """The commands that build `driver` of each family's kernels and run it under compute-sanitizer's tools."""
    build = ("nvcc", "-std=c++17", "-O2", "-lineinfo", "-arch=native", "-I", str(ROOT / "cuda"), "-o", driver)
    programs = (
        ("recurrence", "-DGENERATION=6"),
        ("recurrence", "-DGENERATION=7"),
        ("mix",),
        ("bone",),
        ("cross_entropy",),
    )
    sanitize = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
    runs = tuple((*sanitize, tool, driver) for tool in ("memcheck", "racecheck", "synccheck"))
    source = ROOT / "benchmarks" / "kernel_driver"
    return tuple(
        command for name, *flags in programs for command in ((*build, *flags, str(source / f"{name}.cu")), *runs)
    )


def training(folder):
    """The commands of a short run on the demo's base: data, 10 steps, 10 more by --resume, merge, check; and the first
    10 with CUDA graphs, of the stream's windows and of packed rows."""
    base, data, run = ROOT / "demo" / "rwkv6-demo.pth", folder / "data", folder / "run"
    rwkv_peft = (sys.executable, "-m", "rwkv_peft")
    task = (sys.executable, str(ROOT / "demo" / "task.py"), "finetune", "--documents", "400")
    train = (*rwkv_peft, "train", "--load_model", str(base), "--data_file", str(data))
    graphs = ("--cuda_graphs", "1", "--accumulate_grad_batches", "2", "--epoch_steps", "10", "--epoch_count", "1")
    flags = ("--accelerator", "gpu", "--bone_mode", "bat-in", "--bone_r", "32", "--ctx_len", "256", "--micro_bsz", "8")
    here = (*flags, "--proj_dir", str(run))
    merged = ("--base_model", str(base), "--bone_checkpoint", str(run / "adapter.safetensors"))
    return (
        (*task, "--output", str(folder / "data.jsonl")),
        (*rwkv_peft, "preprocess", str(folder / "data.jsonl"), "--tokenizer", "bytes", "--output", str(data)),
        (*train, *here, "--epoch_steps", "10", "--epoch_count", "1"),
        (*train, *here, "--epoch_steps", "10", "--epoch_count", "2", "--resume"),
        (*rwkv_peft, "merge", *merged, "--output", str(folder / "merged.pth")),
        (*rwkv_peft, "check", *merged, "--merged", str(folder / "merged.pth")),
        (*train, *flags, *graphs, "--proj_dir", str(folder / "graphs")),
        (*train, *flags, *graphs, "--proj_dir", str(folder / "packed"), "--dataload", "pack"),
    )


class Results:
    """results.jsonl: one JSON object a line, on disk as soon as it is known."""

    def __init__(self, folder):
        self._file = open(folder / "results.jsonl", "w", encoding="utf-8")

    def add(self, **entry):
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def run(step, seconds, folder, results):
    """Run a Step for at most so many seconds; -> (what came of it, the last command's exit code)."""
    until = time.monotonic() + seconds
    with open(folder / (step.name.replace(" ", "_") + ".log"), "w", encoding="utf-8") as log:
        for command in step.commands:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            code = run_command(command, until - time.monotonic(), step.name, log, results)
            if code is None:
                return f"stopped after {seconds:.0f} s", code
            if code != 0:
                return f"failed: exit code {code}, see {log.name}", code
    return "passed", 0


def run_command(command, seconds, name, log, results):
    """The exit code of one command, None where its time ran out."""
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
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    return None if late.is_set() else code


def as_object(line):
    """The JSON object that a line is, or None."""
    if not line.startswith("{"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="the python at hand, nothing installed")
    parser.add_argument("--wheels", metavar="FOLDER", help="where wheels are installed from")
    parser.add_argument("--full", action="store_true", help="the whole test suite as well")
    parser.add_argument("--minutes", type=float, default=10, help="no step but --full's goes on after so many")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "gpu_check", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these alone")
    args = parser.parse_args(argv)
    folder = args.output.resolve()
    known = steps(folder, args.full)
    if unknown := set(args.only or ()) - {step.name for step in known}:
        parser.error(f"--only {' '.join(sorted(unknown))}: the steps are {', '.join(step.name for step in known)}")
    for name in ("run", "graphs", "packed"):  # runs of an earlier check
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    began, failed = time.monotonic(), False
    for step in known:
        if args.only and step.name not in args.only:
            continue
        left = 60 * args.minutes - (time.monotonic() - began)
        start, code = time.monotonic(), 0
        if missing := step.missing():
            outcome = f"skipped: no {', '.join(missing)}"
        elif left < 5 and step.name != "suite":
            outcome = f"skipped: {args.minutes:g} minutes are over"
        else:
            outcome, code = run(
                step, step.seconds if step.name == "suite" else min(step.seconds, left), folder, results
            )
        seconds = round(time.monotonic() - start, 1)
        results.add(step=step.name, outcome=outcome, seconds=seconds)
        print(f"{step.name:<14} {seconds:7.1f} s  {outcome}", flush=True)
        if step.name == "card" and (code == NO_GPU or missing):
            print("run this on a machine with an NVIDIA GPU and a CUDA build of torch")
            return NO_GPU
        failed |= code != 0
    print(f"results: {folder / 'results.jsonl'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
