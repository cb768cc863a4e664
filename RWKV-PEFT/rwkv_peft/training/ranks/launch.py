"""Start the ranks of a node by torch's elastic agent, in this process, as torchrun does."""

import json
import logging
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ...children import python_command
from ...cli.errors import NotNow, keeping_handlers, told
from ...config import TrainConfig
from ..saving.checkpoints import how_to_go_on
from .group import LOST
from .world import World

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

LOOK = 0.2  # seconds between two looks at the ranks
ASKED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))  # exit codes after a signal


def launch(world: World, argv: Sequence[str], train: TrainConfig) -> int:
    """Train on the command line `argv` with all ranks of this node, node `world.node` of the run -> the exit code.
    Raises NotNow if the nodes do not meet within join_minutes."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logging.disable(logging.ERROR)  # the agent's log of failures, which are reported below
    place = f"{world.address}:{world.port}, within {train.join_minutes:g} minutes"
    command = python_command("rwkv_peft", "train", *argv)
    with tempfile.TemporaryDirectory(prefix="rwkv_peft-ranks-") as logs, keeping_handlers():
        leave_signals_to_the_agent()
        if world.nodes > 1:
            print(f"ranks     {world.nodes} nodes meet at {place}", flush=True)
        try:
            elastic_launch(agent_config(world, train, logs), command[0])(*command[1:])
            return 0
        except ChildFailedError as error:
            return report(error.failures, world, Path(train.proj_dir))
        except SignalException as end:
            codes = [json.loads(path.read_text())["code"] for path in Path(logs).rglob("error.json")]
            return next((code for code in codes if code not in ASKED), 128 + end.sigval)
        except dist.DistError as error:
            raise NotNow(
                f"{world.nodes} nodes did not meet at {place} (--join_minutes): {told(error)}; see the output of each, "
                "if all reach node 0, and if MASTER_PORT is free there"
            ) from error


def agent_config(world: World, train: TrainConfig, logs: str) -> "LaunchConfig":
    """The configuration of torch's agent on one node, which leaves the ranks' error files in the folder `logs`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    several = world.nodes > 1
    config = LaunchConfig(
        min_nodes=world.nodes,
        max_nodes=world.nodes,
        nproc_per_node=world.devices,
        run_id="rwkv_peft",
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=f"{world.address}:{world.port}",
        rdzv_configs={"rank": world.node, "timeout": max(1, round(60 * train.join_minutes))},
        local_addr=None if several else world.address,
        max_restarts=0,
        monitor_interval=LOOK,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    config.shutdown_timeout = round(60 * train.timeout_minutes)  # before SIGKILL; torch's older agents wait 30 s
    return config


def leave_signals_to_the_agent() -> None:
    """Let signals end this process until the agent handles them, because nodes meet in C++, which runs no handlers of
    Python's. A SIGHUP that is ignored, as under nohup, is blocked, because the agent would handle it too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def report(failures: Mapping[int, Any], world: World, folder: Path) -> int:
    """Return the exit code of the rank that failed first, and print its signal if one ended it; ranks print everything
    else. Those that were ended for another's sake, by LOST or by the agent's SIGTERM, come last."""
    ended = (LOST, *ASKED, -signal.SIGTERM)
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode in ended, item[1].timestamp))
    code: int = first.exitcode
    if code > 0:
        return code
    words = f"error: {world.name(rank)} was ended by {first.signal_name()}; {how_to_go_on(folder)}"
    print(words, file=sys.stderr, flush=True)
    return 1
