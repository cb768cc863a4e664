"""A command of rwkv-peft that is given hostile files, settings or surroundings, for faults.py.

It runs in a process, in a fresh folder, under bounds on memory and time. It must end as the attack says, in words, and
reach for no program or address but its own; one that refuses must leave every file as it was.
"""

import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from fault_processes import REFUSED, hear, started
from fault_training import LIMIT, is_over, run_command, wait

# what runs start and ask: compilers, children of their own (which they name to children.py), ranks of this machine
ALLOWED = ("'gcc'", "/gcc'", "'g++'", "/g++'", "/rwkv_peft/children.py'", "('127.0.0.1', ")
ROOM = 2 << 30  # bytes of address space beyond those of the process that forks
MEMORY = 2048  # MiB that a process may hold, its packages among them
SECONDS = 60  # of a processor that a process may take


class Attack(NamedTuple):
    """make(folder) changes the files of a folder that holds those of the inputs, and gives the words of the command,
    which runs there; told is a pattern of what it must say, code its exit code. typed is its standard input, variables
    are of its environment, within() is called in the process before it, and writes is a pattern of the files that it
    may change though it refuses."""

    name: str
    make: Callable
    told: str
    code: int = REFUSED
    typed: str = ""
    variables: Mapping = MappingProxyType({})
    within: Callable = lambda: None
    writes: str = "$^"


class Outcome(NamedTuple):
    """The faults, each a text, the MiB that a process held at most, and its seconds of a processor."""

    faults: list
    memory: int
    seconds: float


def bounded(attack, words, folder, log, reached):
    """The command in this process, which has no way back."""
    os.setpgrp()
    os.chdir(folder)
    hear(lambda what: any(name in what for name in ALLOWED) or reached.write_text(what))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    attack.within()
    (log.parent / "typed").write_text(attack.typed)
    sys.stdin = open(log.parent / "typed", encoding="utf-8")
    return run_command(words, log, attack.variables)


def prepared(attack, folder, place):
    (place / "words").write_text(json.dumps([str(word) for word in attack.make(folder)]))


def attack_with(attack, inputs, place):
    """Run an Attack in a copy of the folder `inputs`, in the folder `place`; -> its Outcome."""
    folder, log, reached = place / "here", place / "said", place / "reached"
    shutil.copytree(inputs, folder, symlinks=True)
    assert wait(started(prepared, attack, folder, place)) == 0  # by a process of its own, since some take much memory
    before, began = entries(folder), time.monotonic()
    process = started(bounded, attack, json.loads((place / "words").read_text()), folder, log, reached)
    while not is_over(process) and time.monotonic() < began + LIMIT:
        time.sleep(0.01)
    if late := not is_over(process):
        os.killpg(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    seconds, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10
    code, said = os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else ""
    changed = {name for name, _ in before.items() ^ entries(folder).items() if not re.match(attack.writes, name)}
    expected = {
        f"it hangs for {LIMIT} s": not late,
        f"it takes {seconds:.0f} s of a processor": seconds <= SECONDS,
        f"it ends with exit code {code}": code == attack.code or late,
        f"it takes {memory} MiB": memory <= MEMORY,
        f"it does not say {attack.told!r}": re.search(attack.told, said),
        "it prints a traceback": "Traceback" not in said,
        "it prints what moves a terminal's cursor": re.sub(r"[\r\n\t]", "", said).isprintable(),
        f"it reaches for {reached.read_text() if reached.exists() else ''}": not reached.exists(),
        f"it changes {sorted(changed)}": attack.code == 0 or not changed,
    }
    last = f"; it said last: {said.strip().splitlines()[-1][:300]}" if said.strip() else ""
    faults = [f"{attack.name}: {what}{last}" for what, holds in expected.items() if not holds]
    print(*faults, sep="\n", end="\n" * bool(faults), file=sys.stderr, flush=True)
    shutil.rmtree(place)
    return Outcome(faults, memory, seconds)


def entries(folder):
    """{name: kind and bytes} of all that lies in a folder; links are not followed."""
    found = {}
    for path in folder.rglob("*"):
        kind = stat.S_IFMT(path.lstat().st_mode)
        data = path.read_bytes() if stat.S_ISREG(kind) else os.readlink(path) if stat.S_ISLNK(kind) else None
        found[str(path.relative_to(folder))] = kind, data
    return found


def try_attacks(groups, every, inputs, folder):
    """Run each `every`-th of {title: list of Attacks}, with a row of a table for each title; -> the faults."""
    print("\n| attacks | tried | peak memory, MiB | most seconds of a processor | faults |")
    print("|---|---|---|---|---|")
    faults = []
    for title, attacks in groups.items():
        outcomes = [attack_with(attack, inputs, fresh(folder)) for attack in attacks[::every]]
        found = [fault for outcome in outcomes for fault in outcome.faults]
        most, slowest = max(outcome.memory for outcome in outcomes), max(outcome.seconds for outcome in outcomes)
        print(f"| {title} | {len(outcomes)} | {most} | {slowest:.1f} | {len(found)} |", flush=True)
        faults += [f"{title}: {fault}" for fault in found]
    return faults


def fresh(folder):
    place = folder / "attack"
    place.mkdir(parents=True)
    return place
