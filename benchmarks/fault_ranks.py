"""Kills one of several ranks or nodes, for faults.py: the others must end within a minute, each node with one message
and no process left, and the same command must resume and end like an unbroken run."""

import os
import signal
import socket
import time
from typing import NamedTuple

import psutil
from fault_processes import ended
from fault_training import AGAIN, LONG, METHODS, is_over, wait, wait_for_steps

MINUTE = 60  # seconds in which the others end
FLAGS = (*METHODS["bat-in"], *LONG, "--strategy", "deepspeed_stage_2")


class Case(NamedTuple):
    """Kill the first process of node `node` of `nodes` in a run of two ranks, or the process that it started, when
    `steps` steps are done: before the first checkpoint, or after it."""

    name: str
    nodes: int
    steps: int
    node: int = 0
    started: bool = False


CASES = (
    Case("kill -9 of rank 1, after a checkpoint", nodes=1, steps=25, started=True),
    Case("kill -9 of the main process, after a checkpoint", nodes=1, steps=25),
    Case("kill -9 of node 1, after a checkpoint", nodes=2, steps=25, node=1),
    Case("kill -9 of node 0, before a checkpoint", nodes=2, steps=3),
    Case("kill -9 of rank 1, before a checkpoint", nodes=1, steps=3, started=True),
    Case("kill -9 of the main process, before a checkpoint", nodes=1, steps=3),
    Case("kill -9 of node 1, before a checkpoint", nodes=2, steps=3, node=1),
    Case("kill -9 of node 0, after a checkpoint", nodes=2, steps=25),
)


def end_and_resume(training, case):
    """Kill as the case says, and resume -> True if the run was still at work then."""
    unbroken = training.whole("two ranks, unbroken", *FLAGS, "--devices", "2")
    name, folder = case.name, training.folder / case.name
    nodes = start_nodes(training, case)
    wait_for_steps(folder, case.steps, nodes[0])
    if is_over(nodes[0]):
        training.expect(False, name, "the run had ended before it could be killed")
        return False
    children = [child for node in nodes for child in psutil.Process(node).children()]
    others = [node for place, node in enumerate(nodes) if case.started or place != case.node]
    os.kill(children[0].pid if case.started else nodes[case.node], signal.SIGKILL)
    began = time.monotonic()
    codes = [wait(node, MINUTE) for node in others]
    training.expect(set(codes) <= {1}, name, f"the others ended with the exit codes {codes}")
    left = [child for child in children if not gone(child, began + MINUTE)]
    training.expect(not left, name, f"{len(left)} processes were left")
    if not case.started:
        ended(nodes[case.node])
    for place in [place for place, node in enumerate(nodes) if node in others] or [0]:
        said = training.log(name, place).read_text()
        errors = sum(line.startswith("error: ") for line in said.splitlines())  # other lines may be of a compiler
        told = errors == 1 and "Traceback" not in said and "--resume" in said
        training.expect(told, name, f"node {place} did not end with one message")
    training.goes_on(name, unbroken, start_nodes(training, case))
    return True


def start_nodes(training, case, *more, action=None):
    """The first processes of a run's nodes; action as in Training.start."""
    if case.nodes == 1:
        return [training.start(case.name, *FLAGS, *AGAIN, *more, "--devices", "2", action=action)]
    return start_pair(training, case.name, *[(*FLAGS, *AGAIN, *more)] * 2, action=action)


def start_pair(training, name, *flags, action=None):
    """The processes of two nodes, each with flags of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        training.start(name, *own, "--num_nodes", "2", node=place, action=action, NODE_RANK=str(place), **meeting)
        for place, own in enumerate(flags)
    ]


def gone(process, deadline):
    """True if a process ends before the deadline; it counts as ended even if nobody has read its exit code."""
    try:
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    except psutil.NoSuchProcess:
        return True
    return True
