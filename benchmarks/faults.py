"""Kills writers and runs, lets them race and fills their disk, and gives readers broken files; then looks for faults.

    python benchmarks/faults.py --kills 100 --operations 1 --races 40 --mutants 2000
    python benchmarks/faults.py --kills 0 --operations 0 --races 0 --saves 1 --resumes 42 --disks 3 --ends 8 --sleeps 2

Each writer (an adapter and a model saved, a merge, a conversion, preprocessing) writes over an earlier output. A writer
that is killed, at a random moment of its work or before a file operation, must leave the earlier output or the new one,
or for token files one that is refused; the next must end well, with the new output and nothing else in the folder. If
two write at once, the output must be that of one. On a full disk (a tmpfs, if root can mount one) it must say so and
change nothing.

A run of train.py is killed before its file operations, so before, while and after it saves; killed or asked to stop
after some steps, under every method, ZeRO stage and number of ranks; and loses a rank or a node. No checkpoint may be
torn or lost, the other ranks must end within a minute with one message, and --resume auto must end with the bits of an
unbroken run; on other ranks and at another stage (--moves 4) with its losses. If its disk fills or its folder may no
longer be written, it must say so, keep the checkpoint that it had, and resume in the same way. A machine that sleeps
must lose nothing, wherever its clock jumps. Offload is left out, because it is not bitwise by design: DeepSpeed's Adam
for CPUs multiplies up the powers of its betas from step to step, and computes them anew, with other roundings, after a
break.

Commands that are given hostile files, folders, words and surroundings (--attacks 1) must refuse them in one message, or
do as they should, within 2 GiB and a minute of a processor, and reach for nothing else. A run must end in one message
if its files are written over meanwhile, if its nodes read other files (--meanwhile 3), or if its disk fills at some
block of a save (--rooms 10); a comparison that is killed must take its run along. Mutants are those of tests/fuzz under
other seeds; no reader may start a program, or take 2 GiB. Prints counts; the exit code is 1 if an expectation failed.
"""

import argparse
import contextlib
import io
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from fault_attacks import try_attacks
from fault_disks import CASES as DISKS
from fault_disks import lose_and_resume
from fault_files import pickles, rows, sizes
from fault_meanwhile import CHANGES, DIFFERENCES, change_and_end, fill_and_resume, kill_comparison, start_otherwise
from fault_processes import hear
from fault_ranks import CASES, end_and_resume
from fault_run_folders import adapters, comparisons, edits, folders_of_runs, prepare
from fault_sleep import CASES as SLEEPS
from fault_sleep import sleep_and_wake
from fault_surroundings import plans, surroundings, told_names
from fault_training import MOVES, STOPPED, Training, configurations
from fault_writers import WRITERS, Trials, make_inputs, mounted

from rwkv_peft.cli import counted
from rwkv_peft.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MOST_MEMORY = 2048  # MiB of a process that reads broken files, torch and pyarrow among them
EDITS = 100  # single bits of a state.json
SLOWEST = 20  # seconds of a processor that a reader may take over a broken file


def groups(seed):
    """{title: list of Attacks}, all that there are."""
    return {
        "pickles that run code": pickles(),
        "sizes that a file claims": sizes(),
        "rows and tokenizers": rows(),
        "folders of runs": folders_of_runs(),
        "a bit of state.json": edits(seed, EDITS),
        "folders of adapters": adapters(),
        "damaged comparisons": comparisons(),
        "plans of huge models": plans(),
        "names and answers": told_names(),
        "surroundings of a run": surroundings(),
    }


def try_mutants(count, seed, folder):
    """(number of mutants of tests/fuzz that were tried, (seconds, name) of the slowest, the faults)."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest
    from fuzz import specimens, whole
    from fuzz.test_broken_files import broken

    with contextlib.redirect_stdout(io.StringIO()):
        sizes = dict(n_layer=1, n_embd=16, dim_ffn=16, head_size=8, vocab_size=257, maa_rank=2, decay_rank=2)
        whole.write_all(folder, conftest.make_tiny_state(**sizes))
    warnings.simplefilter("ignore")  # of torch, on the tensors that a mutation makes
    here = [specimen for specimen in specimens.SPECIMENS if (folder / specimen.file).exists()]
    others = {item.file: (folder / item.file).read_bytes() for item in here}
    faults, tried, slowest, started = [], 0, (0.0, ""), []
    hear(started.append)
    for specimen in here:
        for number in range(seed * count, seed * count + count // len(here)):
            what, data = broken(specimen, number, others)
            (folder / specimen.file).write_bytes(data)
            began, tried = time.process_time(), tried + 1
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    specimen.use(folder)
                except UserError:
                    pass  # which is what a broken file is to end in
                except Exception as error:  # whatever it is, it is a fault
                    faults.append(f"{specimen.file}, mutant {number}, {what}: {type(error).__name__}: {error}")
            if started:
                faults.append(f"{specimen.file}, mutant {number}, {what}: starts {started.pop()}")
            slowest = max(slowest, (time.process_time() - began, f"{specimen.file}, mutant {number}, {what}"))
        (folder / specimen.file).write_bytes(others[specimen.file])
    if slowest[0] > SLOWEST:
        faults.append(f"{slowest[1]}: {slowest[0]:.0f} s")
    return tried, slowest, faults


def try_writers(args, folder, rng):
    """Print a row for each writer; -> the faults."""
    faults = []
    make_inputs(folder)
    disk = mounted(folder / "disk")
    print("| writer | kills that hit | at operations | with leftovers | races | full disk | faults |")
    print("|---|---|---|---|---|---|---|")
    try:
        for place, writer in enumerate(WRITERS):
            trials = Trials(writer, folder, folder / writer.name, rng)
            hits = sum(trials.kill() for _ in range(place, args.kills, len(WRITERS)))
            operations = trials.kill_at_operations(args.operations) if args.operations else 0
            races = len([trials.race() for _ in range(place, args.races, len(WRITERS))])
            if disk:
                trials.fill(folder / "disk")
            told = "told" if disk else "not tried"
            row = (hits, operations, trials.left, races, told, len(trials.faults))
            print(f"| {writer.name} |", " | ".join(map(str, row)), "|", flush=True)
            faults += trials.faults
    finally:
        if disk:
            subprocess.run(["umount", str(folder / "disk")], check=True)
    return faults


def try_training(args, folder, rng):
    """Print a row for each way to end a run; -> the faults."""
    training = Training(folder, rng)
    print("\n| training | trials | that hit | faults |")
    print("|---|---|---|---|")

    def row(name, trials):
        before, hits = len(training.faults), list(trials)
        print(f"| {name} | {len(hits)} | {sum(hits)} | {len(training.faults) - before} |", flush=True)

    if args.saves:
        row("kill -9 at file operations", training.kill_at_operations(args.saves))
        row("the same, --keep_checkpoints 1", training.kill_at_operations(args.saves, "--keep_checkpoints", "1"))
    for ranks in (1, 2):
        chosen = [configuration for configuration in configurations()[: args.resumes] if configuration.ranks == ranks]
        if chosen:
            row(f"stopped after {STOPPED} steps, {counted(ranks, 'rank')}", map(training.stop_and_resume, chosen))
    if args.moves:
        row("killed, and on on other ranks", map(training.move, MOVES[: args.moves]))
    for case in DISKS[: args.disks]:
        row(case.name, (lose_and_resume(training, chosen) for chosen in [case]))
    for case in CASES[: args.ends]:
        row(case.name, (end_and_resume(training, chosen) for chosen in [case]))
    for case in CHANGES if args.meanwhile else ():
        row(case.name, (change_and_end(training, case, number) for number in range(args.meanwhile)))
    if args.meanwhile:
        row("a node reads other files", (start_otherwise(training, name) for name in DIFFERENCES))
        row("kill -9 of a comparison", (kill_comparison(training, number) for number in range(args.meanwhile)))
    for steps in (2, 7) if args.rooms else ():
        shares = [number / args.rooms for number in range(args.rooms)]
        row(f"full disk, {steps} steps", (fill_and_resume(training, steps, share) for share in shares))
    for case in SLEEPS[: args.sleeps]:
        row(case.name, (sleep_and_wake(training, chosen) for chosen in [case]))
    return training.faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at random moments, over all writers")
    parser.add_argument(
        "--operations", type=int, default=1, help="kill at each N-th file operation of a writer; 0: none"
    )
    parser.add_argument("--races", type=int, default=40, help="over all writers")
    parser.add_argument("--mutants", type=int, default=0, help="over all readers")
    parser.add_argument("--attacks", type=int, default=0, help="try each N-th hostile file, folder and word; 0: none")
    parser.add_argument("--saves", type=int, default=6, help="kill at each N-th file operation of a run; 0: none")
    parser.add_argument("--resumes", type=int, default=14, help="runs that are stopped; 42: each method, stage, ranks")
    parser.add_argument("--moves", type=int, default=0, help="runs that are killed and go on on other ranks")
    parser.add_argument("--disks", type=int, default=len(DISKS), help="ways to take the disk away from a run")
    parser.add_argument("--ends", type=int, default=len(CASES), help="ways to kill one of several ranks or nodes")
    parser.add_argument("--meanwhile", type=int, default=0, help="times that each input of a run is written over")
    parser.add_argument("--rooms", type=int, default=0, help="parts of a first and of a later save at which disks fill")
    parser.add_argument("--sleeps", type=int, default=len(SLEEPS), help="ways to let the machine sleep")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder, rng = Path(folder), random.Random(args.seed)
        faults = try_writers(args, folder, rng)
        if (
            args.saves
            or args.resumes
            or args.moves
            or args.disks
            or args.ends
            or args.sleeps
            or args.meanwhile
            or args.rooms
        ):
            faults += try_training(args, folder / "training", rng)
        if args.attacks:
            prepare(folder / "inputs")
            faults += try_attacks(groups(args.seed), args.attacks, folder / "inputs", folder)
        if args.mutants:
            (folder / "fuzz").mkdir()
            tried, slowest, found = try_mutants(args.mutants, args.seed, folder / "fuzz")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{tried} broken files, {len(found)} faults, peak memory {peak} MiB")
            print(f"the slowest: {slowest[0]:.1f} s, {slowest[1]}")
            if peak > MOST_MEMORY:
                found.append(f"broken files took {peak} MiB")
            faults += found
    print(*faults, sep="\n", end="\n" * bool(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
