"""Runs train.py as a process of its own, and reads its files."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType

import warm
from rwkv_peft.training.saving.checkpoints import CHECKPOINTS

ROOT = Path(__file__).resolve().parents[2]


def start(argv, cold=False, **variables):
    """Start a command; cold: in a new interpreter, and with pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    if cold or python_of(argv) == sys.executable:
        return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    return warm.Command(argv, environment)


def python_of(argv):
    """The program that runs a command's file. What is forked cannot use a GPU that was looked at before."""
    return sys.executable if "gpu" in argv else warm.python()


def start_ranks(argv, variables=MappingProxyType({})):
    """Start the ranks of a command on one machine as torchrun would, with {rank: its own environment variables}. A
    command's own ranks begin with seconds of imports; tests/training/test_ranks.py is about those."""
    devices = int(argv[argv.index("--devices") + 1]) if "--devices" in argv else 1
    if devices == 1 or "gpu" in argv:
        return [start(argv)]
    port = free_port()
    world = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [{**world, **variables.get(rank, {})} for rank in range(devices)]
    return [start(argv, RANK=str(rank), LOCAL_RANK=str(rank), **own[rank]) for rank in range(devices)]


def free_port():
    """A free port. A connection there has just ended, so that for a minute the system gives the port only to those who
    ask for it by number."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()), server.accept()[0]:
            pass
        return str(server.getsockname()[1])


def finish(process, code=0, timeout=1800):
    """timeout in seconds: the first test that offloads compiles, which takes minutes beside other work."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def wait_for_steps(files, name, steps, process):
    """Wait until a run in the folder `name` has taken so many steps."""
    path = files / name / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_text().count("\n") >= steps, process)


def wait_for_words(words, process):
    """Wait until a command has printed some words; its pipe is read until then."""
    if process.stdout:
        assert any(words in line for line in process.stdout), process.communicate()
    else:
        wait_until(lambda: words in process.outputs[0].read_text(), process, pause=0.001)


def wait_until(holds, process, pause=0.01):
    """Wait until holds() is true, which a process brings about before it ends."""
    over = False
    while not holds():
        assert not over, process.communicate()
        over = process.poll() is not None  # and may have brought it about since holds() was asked
        time.sleep(pause)


def rewound(run, name):
    """Copy a run's folder to one beside it, as if it had been killed before its last checkpoint -> the copy, which has
    what was trained in checkpoints alone."""
    copy = shutil.copytree(run, run.with_name(name))
    for newest in ("adapter.safetensors", "rwkv.pth", "state.pth"):
        (copy / newest).unlink(missing_ok=True)
    shutil.rmtree(max((copy / CHECKPOINTS).iterdir()))
    return copy


def metrics(files, name):
    """The lines that a run has written, without one that it is writing."""
    lines = (files / name / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
