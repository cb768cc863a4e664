"""Start the other processes of a node, which end when the process that started them is gone, however it ended.

That process holds the other end of their standard input, which the system closes when it is gone.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...children import python_command, when_parent_ends
from ..flags.request import parse_flags
from ..flags.world import World, find_world
from ..saving.checkpoints import how_to_go_on

RANK = "rwkv_peft.training.rank"  # the module that each of them runs
FAREWELL = 30.0  # seconds that a process which is done may take to end


class Processes:
    """The processes that this one started, by their ranks."""

    def __init__(self) -> None:
        self.started: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, world: World, argv: Sequence[str], port: int) -> None:
        """Start the other processes of this node on the same command line, to meet at `port`."""
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
        """Return (rank, how it ended) of a process that ended with an error, None if none did."""
        for rank, process in self.started.items():
            if code := process.poll():
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return rank, how
        return None

    def wait(self) -> None:
        """Wait until the processes, which are done, have ended; kill one that takes longer than FAREWELL."""
        for process in self.started.values():
            try:
                process.wait(FAREWELL)
            except subprocess.TimeoutExpired:
                process.kill()

    def kill(self) -> None:
        """Kill the processes, and wait until they are gone."""
        for process in self.started.values():
            process.kill()
        for process in self.started.values():
            process.wait()


def end_with_parent() -> None:
    """Make this process end when the one that started it is gone, which closes standard input; the first of a node's
    children prints a message. Ctrl-C is ignored here, because the parent handles it."""
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
