"""The ranks of a run: their start by torch's elastic agent, their process group, and their end when one fails."""

import json
import logging
import os
import platform
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import psutil
import torch
import torch.distributed as dist

from ...children import python_command
from ...cli.errors import ENDINGS, HANGUP, NotNow, UserError, explained, keeping_handlers, summarize
from ...config import TrainConfig
from ...ops.products import ProductRow, agreed, row
from ...system import end_group
from ..saving.checkpoints import how_to_go_on, is_of_connection
from .agreement import disagreement
from .world import LOOPBACK, World

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

LOST = 76  # exit code of a rank that lost the others and knows no reason (EX_PROTOCOL of sysexits.h)
FAILED = "failed"  # key of the store: the first Failure of the run
PERIOD = 1.0  # seconds between two looks at the store
GRACE = 3.0  # seconds in which another rank's Failure may come after a connection to it broke
INTACT = "interrupted; what was saved before is intact"
VISIBLE = 10.0  # seconds in which a file must appear on a shared disk
LOOK = 0.2  # seconds between two looks of the agent at the ranks
LAST = 5.0  # seconds that ranks have to end after the second signal
ASKED = tuple(128 + number for number in (signal.SIGINT, *ENDINGS))  # exit codes after a signal


class Failure(NamedTuple):
    """The end of a rank: its number, its machine, its exit code and its message."""

    rank: int
    host: str
    code: int
    message: str


class Ranks:
    """A rank of a run, as a context within which torch's default process group exists.

    An exception within ends this process and the other ranks at once: collectives would wait for this one in vain, as
    an orderly end of NCCL does. A thread looks at the store for such a Failure every PERIOD seconds.
    """

    def __init__(self, world: World, train: TrainConfig, device: torch.device) -> None:
        self.world, self.train, self.host = world, train, platform.node()
        self.backend = "gloo" if device.type == "cpu" else "nccl"
        self.store: dist.Store = single_store()
        self.link: dist.Store = self.store  # the thread's own connection
        self.ending, self.done, self.leaving = threading.Lock(), threading.Event(), threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> "Ranks":
        world, limit = self.world, timedelta(minutes=self.train.timeout_minutes)
        try:
            if world.size > 1:
                self.store, self.link = self.connect(meets=not world.hosted), self.connect()
                self.store.set_timeout(limit)  # NCCL fetches its id there, and rank 0 may be late
                self.watcher.start()
            dist.init_process_group(
                self.backend, store=self.store, rank=world.rank, world_size=world.size, timeout=limit
            )
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def connect(self, meets: bool = False) -> dist.Store:
        """A connection to the run's store. torchrun's agent keeps the store. Without an agent rank 0 keeps it and
        `meets` the others there. Raises NotNow if they are not there within join_minutes."""
        world = self.world
        minutes = 1.0 if world.hosted else self.train.join_minutes  # an agent's store is there, or its agent is gone
        limit, keeps = timedelta(minutes=minutes), meets and world.rank == 0
        try:
            link = dist.TCPStore(world.address, world.port, world.size, keeps, limit, wait_for_workers=meets)
        except dist.DistError as error:
            raise NotNow(
                f"rank {world.rank} of {world.size} did not meet the others at {world.address}:{world.port} within "
                f"{minutes:g} minutes (--join_minutes): {summarize(error)}; see the output of each, if all reach rank "
                "0, and if MASTER_PORT is free there"
            ) from error
        # an agent may keep one store for all starts of a run
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if world.hosted else "0"
        return dist.PrefixStore(f"rwkv_peft/{start}", link)

    def agree(self, values: Mapping[str, Any], folder: Path) -> None:
        """Compare {name: value or digest} over all ranks; check that their nodes share `folder`. Raises UserError, on
        every rank, for the first that differs from rank 0."""
        world = self.world
        token = folder / f".shared-{secrets.token_hex(8)}"
        if world.rank == 0:
            token.touch()
        try:
            names, hosts, all_values = zip(*gathered((token.name, self.host, dict(values))))
            shared = gathered(not world.leads or appears(folder, names[0]))
        finally:
            if world.rank == 0:
                token.unlink()
        if not all(shared):  # first, because nodes that see two folders also disagree about checkpoints
            other = shared.index(False)
            raise UserError(
                f"--proj_dir {folder} of {world.name(0)} on {hosts[0]} is another folder than that of "
                f"{world.name(other)} on {hosts[other]}, and every node writes a part of each checkpoint; name a "
                "folder on a disk that all nodes share"
            )
        if words := disagreement(world, all_values, hosts):
            raise UserError(words)

    def row(self, state: Mapping[str, Any] | None) -> tuple[ProductRow, list[str]]:
        """(the Row by which the run's products are computed, notes on it); state is the state.json of the checkpoint
        that it goes on from, or None. GPUs have no rows: each rank's own."""
        if self.backend != "gloo":
            return row(), []
        return agreed(gathered(row()) if self.world.size > 1 else [row()], (state or {}).get("products"))

    def least(self, value: int) -> int:
        """The least of the ranks' values."""
        return min(gathered(value)) if self.world.size > 1 else value

    def leave(self, code: int) -> int:
        """Return rank 0's exit code once all ranks are done: an agent ends all when one exits with an error code. Until
        then a Failure of another rank ends this one, as when rank 0 finds its disk full while it draws the loss."""
        self.leaving.set()
        if self.world.size > 1:
            code = gathered(code)[0]
        self.done.set()
        self.record(Failure(self.world.rank, self.host, code, ""))
        return code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.link is not self.store:
            self.fail(error)
        self.done.set()
        if self.watcher.is_alive():
            self.watcher.join(GRACE)  # Python's end would abort the process while the thread is inside of the store
        if dist.is_initialized():
            dist.destroy_process_group()

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of an exception. The first exception of a run also ends the other ranks."""
        ignore_signals(type(error), error, None)
        if isinstance(error, Exception) and is_of_connection(error):
            time.sleep(GRACE)  # the thread ends this process if another rank's Failure comes
            self.end(self.lost(summarize(error)))
        code, message = explained(error) or (1, "".join(traceback.format_exception(error)).rstrip())
        if isinstance(error, KeyboardInterrupt):
            self.stop(error.args[0] if error.args else signal.SIGINT)
        self.end(Failure(self.world.rank, self.host, code, message))

    def stop(self, number: int) -> NoReturn:
        """End this process and the other ranks because of a signal."""
        self.end(Failure(self.world.rank, self.host, 128 + number, INTACT))

    def watch(self) -> None:
        """End this process once another rank has failed, or the store is gone."""
        while not self.done.wait(PERIOD):
            reason = ""
            try:
                if not self.link.check([FAILED]):
                    continue
            except dist.DistError as error:
                if self.leaving.is_set():  # a rank that is done may take the store with it
                    return
                reason = summarize(error)
            if not self.done.is_set():
                self.end(self.lost(reason))

    def lost(self, reason: str) -> Failure:
        """The Failure of a rank that lost another one, by a library's reason."""
        waited = f"; --timeout_minutes is {self.train.timeout_minutes:g}" * ("timed out" in reason.lower())
        message = f"error: {self.world.name(self.world.rank)} lost the connection to another rank ({reason}{waited}), "
        message += f"whose output says why; {how_to_go_on(Path(self.train.proj_dir))}"
        return Failure(self.world.rank, self.host, LOST, message)

    def end(self, failure: Failure) -> NoReturn:
        """End this process with the exit code of the run's first Failure: `failure`, unless there is another. It is
        printed by the rank that fails first and by the first rank of each other node."""
        if not self.ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends this process
        first = failure
        with suppress(dist.DistError):
            first = Failure(*json.loads(self.link.compare_set(FAILED, "", json.dumps(failure))))
        world, words = self.world, first.message
        if first != failure:
            words = f"error: {world.name(first.rank)} on {first.host} ended: {words.removeprefix('error: ')}"
        if first == failure or world.leads and first.rank // world.devices != world.node:
            with suppress(OSError):  # the terminal may be gone
                print(words, file=sys.stderr, flush=True)
        self.record(first)
        if first == failure and (world.nodes > 1 or not world.hosted):
            time.sleep(2 * PERIOD)  # the store may go with this process or its agent, and the others have to see it
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(first.code)

    def record(self, failure: Failure) -> None:
        """Write a Failure to the file that torch's agent reads."""
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            Path(path).write_text(json.dumps({**failure._asdict(), "timestamp": int(time.time())}))


def single_store() -> dist.Store:
    """The store of a single rank, within its process."""
    if sys.platform == "win32":  # whose torch has no other
        return dist.TCPStore(LOOPBACK, 0, 1, True)
    return dist.HashStore()


def ignore_signals(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    """After an exception, ignore signals: an agent's SIGTERM would raise in the middle of an orderly end."""
    if error is not None:
        for number in (signal.SIGINT, *ENDINGS):
            signal.signal(number, signal.SIG_IGN)


def gathered(value: Any) -> list[Any]:
    """[the value of each rank], on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def appears(folder: Path, name: str) -> bool:
    """True once a file is in a folder, False if it is not there within VISIBLE seconds."""
    deadline = time.monotonic() + VISIBLE
    # a listing, because network disks take a name that was looked up too early to be absent for a while
    while not (seen := folder.is_dir() and name in os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return seen


def launch(world: World, argv: Sequence[str], train: TrainConfig) -> int:
    """Train on the command line `argv` with all ranks of this node, node `world.node` of the run -> the exit code.
    Raises NotNow if the nodes do not meet within join_minutes."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logging.disable(logging.ERROR)  # the agent's log of failures, which are reported below
    # each rank would else take as many threads as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // world.devices)))
    place = f"{world.address}:{world.port}, within {train.join_minutes:g} minutes"
    command = python_command("rwkv_peft", "train", *argv)
    with tempfile.TemporaryDirectory(prefix="rwkv_peft-ranks-") as logs, keeping_handlers(), ending_ranks():
        leave_signals_to_the_agent()
        if world.nodes > 1:
            print(f"ranks     {world.nodes} nodes meet at {place}", flush=True)
        try:
            elastic_launch(agent_config(world, train, logs), command[0])(*command[1:])
            return 0
        except ChildFailedError as error:
            return report(error.failures, world, Path(train.proj_dir))
        except SignalException as end:
            ignore_signals(type(end), end, None)
            codes = [json.loads(path.read_text())["code"] for path in Path(logs).rglob("error.json")]
            return next((code for code in codes if code not in ASKED), 128 + end.sigval)
        except dist.DistError as error:
            raise NotNow(
                f"{world.nodes} nodes did not meet at {place} (--join_minutes): {summarize(error)}; see the output of "
                "each, if all reach node 0, and if MASTER_PORT is free there"
            ) from error


def agent_config(world: World, train: TrainConfig, logs: str) -> "LaunchConfig":
    """The configuration of torch's agent on one node. The ranks' error files go to the folder `logs`."""
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


@contextmanager
def ending_ranks() -> Iterator[None]:
    """Within, kill this node's ranks upon the second signal; at the end, those that are left. A rank that is stopped,
    or waits for one, hears no signal. The agent would wait for it as long as for a save."""

    def kill(number: int = signal.SIGTERM) -> list[psutil.Process]:
        for rank in (ranks := psutil.Process().children()):
            end_group(rank.pid)
        return ranks

    try:
        with upon_second_signal(kill):
            yield
    finally:
        psutil.wait_procs(kill(), LAST)


@contextmanager
def upon_second_signal(act: Callable[[int], object]) -> Iterator[None]:
    """Within, call act(number) in a thread LAST seconds after a second signal, or upon a third: a process that waits in
    a collective runs no handlers of Python's. A terminal that goes away does not count: a run saves then."""
    signals, wakes = socket.socketpair()  # signal numbers come here, whichever handlers are set
    wakes.setblocking(False)

    def watch() -> None:
        with signals:
            count = 0
            while count < 2:
                if not (number := signals.recv(1)):
                    return
                count += number[0] not in HANGUP
            signals.settimeout(LAST)
            with suppress(TimeoutError):
                if not signals.recv(1):
                    return
            act(number[0])

    before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        wakes.close()


def leave_signals_to_the_agent() -> None:
    """Let signals end this process until the agent handles them: nodes meet in C++, where no handler of Python's runs.
    A SIGHUP that is ignored, as under nohup, is blocked: the agent would handle it too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def report(failures: Mapping[int, Any], world: World, folder: Path) -> int:
    """The exit code of the rank that failed first. Its signal is printed if one ended it; ranks print everything else.
    Those that were ended for another's sake, by LOST or by the agent's SIGTERM, come last."""
    ended = (LOST, *ASKED, -signal.SIGTERM)
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode in ended, item[1].timestamp))
    code: int = first.exitcode
    if code > 0:
        return code
    words = f"error: {world.name(rank)} was ended by {first.signal_name()}; {how_to_go_on(folder)}"
    print(words, file=sys.stderr, flush=True)
    return 1
