"""The further processes of a node: each lives no longer than the one that started it, however that one ends.

A process holds the other end of its children's standard input, which the system closes when the process is gone.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..children import python_command, when_parent_ends
from .checkpoints import how_to_go_on
from .flags import parse_flags
from .world import World, find_world

RANK = f"{__package__}.rank"  # the module that each of them runs
FAREWELL = 30.0  # seconds that a process which is done may take to end


class Processes:
    """Those that this process started, by their ranks."""

    def __init__(self) -> None:
        self.started: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, world: World, argv: Sequence[str], port: int) -> None:
        """Start the others of this node on the same command line, to meet at `port`."""
        environment = os.environ | {
            "WORLD_SIZE": str(world.size),
            "LOCAL_WORLD_SIZE": str(world.devices),
            "MASTER_ADDR": world.address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": str(False),
        }
        for local in range(1, world.devices):
            rank = world.rank + local
            own = {"RANK": str(rank), "LOCAL_RANK": str(local)}
            self.started[rank] = subprocess.Popen(
                python_command(RANK, *argv), env=environment | own, stdin=subprocess.PIPE
            )

    def failed(self) -> tuple[int, str] | None:
        """(rank, how it ended) of one that ended with an error."""
        for rank, process in self.started.items():
            if code := process.poll():
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return rank, how
        return None

    def wait(self) -> None:
        """Let those that are done end by themselves."""
        for process in self.started.values():
            try:
                process.wait(FAREWELL)
            except subprocess.TimeoutExpired:
                process.kill()

    def kill(self) -> None:
        """End them now."""
        for process in self.started.values():
            process.kill()
        for process in self.started.values():
            process.wait()


def end_with_parent() -> None:
    """End this process when the one that started it is gone, whose other end of standard input is closed then; the
    first of a node's children says so. A Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    when_parent_ends(_end)


def _end() -> None:
    try:
        train = parse_flags(sys.argv[1:]).train
        world = find_world(train)
        if world.local_rank == 1:
            gone = world.name(world.rank - 1)
            message = f"error: {gone}, which had started the others, is gone; {how_to_go_on(Path(train.proj_dir))}"
            print(message, file=sys.stderr, flush=True)
    finally:
        os._exit(1)
