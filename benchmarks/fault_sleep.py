"""A machine that sleeps during a run of two nodes, for faults.py: every process stops for longer than the ranks'
silence and --stall_minutes allow, and when they wake, the wall clock that Python's time() reads has jumped. The run
must continue and end like an unbroken one, without an error message."""

import mmap
import os
import signal
import struct
import time
from typing import NamedTuple

import psutil
from fault_ranks import FLAGS, Case, start_nodes
from fault_training import LIMIT, train, wait, wait_for_steps

from rwkv_peft.training.ranks.watch import PERIOD, SILENT

ASLEEP = (SILENT + 10) * PERIOD  # seconds
STALL = ("--stall_minutes", "0.5")
HOURS = 3600.0


class Sleep(NamedTuple):
    """Sleep when `steps` steps are done, before the first checkpoint or after it; the clock jumps by `jump` seconds."""

    name: str
    steps: int
    jump: float


CASES = (
    Sleep("asleep before a checkpoint, the clock goes ahead", steps=3, jump=8 * HOURS),
    Sleep("asleep after a checkpoint, the clock goes back", steps=25, jump=-8 * HOURS),
)


def sleep_and_wake(training, case):
    """Let a run sleep and wake as a Sleep says -> True if the run was still at work then."""
    unbroken = training.whole("two ranks, unbroken", *FLAGS, "--devices", "2")
    clock = mmap.mmap(-1, 8)  # by how much the clock has jumped, for all that are forked from here
    nodes = start_nodes(training, Case(case.name, nodes=2, steps=case.steps), *STALL, action=by_clock(clock))
    wait_for_steps(training.folder / case.name, case.steps, nodes[0])
    processes = [process for node in nodes for process in family(node)]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    met = (training.folder / case.name / "metrics.jsonl").read_text().count("\n") < len(unbroken.numbers)
    time.sleep(ASLEEP)
    clock[:] = struct.pack("d", case.jump)
    for process in processes:
        os.kill(process, signal.SIGCONT)
    codes = [wait(node, LIMIT) for node in nodes]
    well = codes == [0, 0]
    training.expect(well, case.name, f"it ended with the exit codes {codes}")
    training.expect(not well or training.outcome(case.name) == unbroken, case.name, "it ended otherwise")
    for place in range(2):
        said = training.log(case.name, place).read_text()
        errors = [line for line in said.splitlines() if line.startswith(("error: ", "Traceback"))]
        training.expect(not errors, case.name, f"node {place} said {errors}")
    return met


def by_clock(clock):
    """train() with a wall clock that is shifted by the seconds in the map `clock`."""

    def action(*arguments):
        right, right_ns = time.time, time.time_ns
        time.time = lambda: right() + struct.unpack("d", clock[:])[0]
        time.time_ns = lambda: right_ns() + int(1e9 * struct.unpack("d", clock[:])[0])
        return train(*arguments)

    return action


def family(process):
    """The ids of a process and of all that it started."""
    return [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]
