"""Let the ranks of a run meet before it begins, and tell each of them why another one ends.

Rank 0, or torchrun, keeps a TCPStore. Every rank writes there what it is about to do, its passport; rank 0 compares
them, and no rank begins before all agree. A rank that ends for a reason of its own writes the reason there too
(watch.py).
"""

import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ...cli.errors import Ended, NotNow, UserError, ending_of, told
from ..flags.world import LOOPBACK, World
from ..saving.checkpoints import is_of_connection
from .agreement import disagreement
from .processes import Processes
from .watch import CAME, END, LEFT, Watch, acknowledge, beat, first_reason

ANSWER = timedelta(seconds=30)  # timeout of the store
EVERY = 10.0  # seconds between two messages about waiting
VISIBLE = 10.0  # seconds in which a file must appear on a shared disk
GOODBYE = 30.0  # seconds that rank 0, which keeps the store, waits for the others to be done


class Ranks:
    """The ranks of a run as one of them sees them: a context manager whose body is the run. An error that ends the body
    is told to the other ranks. `store` is given to torch's process group."""

    def __init__(self, world: World, argv: Sequence[str], join_minutes: float, say: Callable[..., object]) -> None:
        self.world, self.argv, self.join_minutes = world, argv, join_minutes
        self.say = say
        self.host = platform.node()
        self.processes = Processes()
        self.server: dist.TCPStore | None = None
        self.store: dist.Store = dist.HashStore()  # for a process alone
        self.watch: Watch | None = None
        self.connected = False

    def __enter__(self) -> "Ranks":
        if self.world.size > 1 and self.world.rank == 0 and not self.world.hosted:
            self.server = keep_store(self.world.port)
            self.connect(self.server)
        return self

    def connect(self, link: dist.TCPStore) -> None:
        """Use a connection to the store, and count this rank as come."""
        self.store, self.connected = self.part_of_run(link), True
        self.store.add(CAME, 1)

    def part_of_run(self, link: dist.TCPStore) -> dist.Store:
        """The part of the store that belongs to this start of the run, if torchrun keeps one store for its restarts."""
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if self.world.hosted else "0"
        return dist.PrefixStore(f"rwkv_peft/{count}", link)

    def meet(self, passport: Mapping[str, Any], folder: Path, stall_minutes: float) -> None:
        """Start the other processes of the node, if that is this one's task, wait for all ranks, and start the watch.
        Raises UserError if they do not come, disagree in their passports (training/ranks/agreement.py), or do not see
        the same folder."""
        own = None
        if self.world.size > 1:
            link = self.server or self.reach()
            if not self.connected:
                self.connect(link)
            self.gather_nodes()
            if self.world.starts:
                self.processes.start(self.world, self.argv, link.port)
            self.agree(passport, folder)
            own = self.part_of_run(call(LOOPBACK if self.server else self.world.address, link.port))
        self.watch = Watch(self.world, folder, stall_minutes, self.processes, own)
        self.watch.start()

    def reach(self) -> dist.TCPStore:
        """Connect to the store, which may not be there yet. Raises UserError after join_minutes."""
        address, port = self.world.address, self.world.port
        waiting = Waiting(self.join_minutes, self.say)
        while True:
            try:
                return call(address, port, waiting.left())
            except (OSError, dist.DistError) as error:
                reason = f" ({error.strerror})" if isinstance(error, socket.gaierror) else ""
            waiting(f"node 0 of {self.world.nodes} at {address}:{port}{reason}")

    def gather_nodes(self) -> None:
        """Register this node; rank 0 waits for the others. Raises UserError for a number used twice, or other flags."""
        world, store = self.world, self.store
        mine = {"--devices": world.devices, "--num_nodes": world.nodes}
        if world.leads:
            card = {"host": self.host, "token": secrets.token_hex(8), **mine}
            there = json.loads(store.compare_set(f"node/{world.node}", "", json.dumps(card)))
            if there != card:
                self.refuse(
                    f"{there['host']} and {self.host} both say that they are node {world.node}; give each node its own "
                    "NODE_RANK, counted from 0"
                )
        if world.rank:
            return
        waiting = Waiting(self.join_minutes, self.say)
        for node in range(1, world.nodes):
            at = f" at {world.address}:{world.port}"
            self.wait_for(f"node/{node}", waiting, f"node {node} of {world.nodes}{at}")
            theirs = json.loads(store.get(f"node/{node}"))
            for flag, value in mine.items():
                if theirs[flag] != value:
                    self.refuse(
                        f"{flag} is {value} on node 0 ({self.host}) and {theirs[flag]} on node {node} "
                        f"({theirs['host']}); give every node the same command"
                    )

    def agree(self, passport: Mapping[str, Any], folder: Path) -> None:
        """Compare what the ranks are about to do, and check that their nodes see the same folder."""
        world, store = self.world, self.store
        store.set(beat(world.rank), "0")
        store.set(f"passport/{world.rank}", json.dumps({"host": self.host, **passport}))
        waiting = Waiting(self.join_minutes, self.say, first=EVERY)
        if world.rank:
            self.wait_for("shown", waiting, f"rank 0 of {world.size}")
            return self.see(folder)
        passports = []
        for rank in range(world.size):
            self.wait_for(f"passport/{rank}", waiting, f"{world.name(rank)}")
            passports.append(json.loads(store.get(f"passport/{rank}")))
        hosts = [passport.pop("host") for passport in passports]
        self.show(folder, waiting, hosts)  # first, because nodes that see two folders also disagree about checkpoints
        if difference := disagreement(world, passports, hosts):
            self.refuse(difference)
        store.set("begin", "")

    def show(self, folder: Path, waiting: "Waiting", hosts: Sequence[str]) -> None:
        """Write a file into the folder, and wait until the other nodes have looked for it; hosts: their machines."""
        world, store = self.world, self.store
        token = folder / f".shared-{secrets.token_hex(8)}"
        token.touch()
        try:
            store.set("shown", token.name)
            for node in range(1, world.nodes):
                self.wait_for(f"seen/{node}", waiting, f"node {node} of {world.nodes}")
                if store.get(f"seen/{node}") == b"no":
                    self.refuse(
                        f"--proj_dir {folder} of node 0 ({self.host}) is another folder than that of node {node} "
                        f"({hosts[node * world.devices]}), and every node writes a part of each checkpoint; name a "
                        "folder on a disk that all nodes share"
                    )
        finally:
            token.unlink()

    def see(self, folder: Path) -> None:
        """Look for rank 0's file in the folder, and wait until rank 0 has found that all ranks agree."""
        world, store = self.world, self.store
        token, deadline = store.get("shown").decode(), time.monotonic() + VISIBLE
        if world.leads:
            # a listing, because network disks take a name that was asked for too early to be absent for a while
            while not (seen := folder.is_dir() and token in os.listdir(folder)) and time.monotonic() < deadline:
                time.sleep(0.1)
            store.set(f"seen/{world.node}", "yes" if seen else "no")
        self.wait_for("begin", Waiting(self.join_minutes, self.say, first=EVERY), f"rank 0 of {world.size}")

    def wait_for(self, key: str, waiting: "Waiting", whom: str) -> None:
        """Wait until a key is in the store. Raises UserError if that takes too long, or if a rank ends meanwhile."""
        try:
            while not self.store.check([key]):
                if failed := self.processes.failed():
                    rank, how = failed
                    self.refuse(f"{self.world.name(rank)} {how}", NotNow)
                if self.store.check([END]):
                    self.refuse("")
                waiting(whom)
        except dist.DistError:
            raise NotNow(
                f"node 0 of {self.world.nodes} at {self.world.address}:{self.world.port} has ended; its output there "
                "says why"
            ) from None

    def refuse(self, reason: str, kind: type[UserError] = UserError) -> None:
        """Raise UserError with the reason, or with what another rank said first; ranks that wait raise the same."""
        raise kind(*first_reason(self.store, reason).split("\n"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.watch:
            if self.connected and isinstance(error, RuntimeError) and is_of_connection(error):
                self.watch.explain()
            self.watch.stop()
        if error is None:
            self.leave()
            self.processes.wait()
            return
        self.tell(error)
        self.processes.kill()
        if isinstance(error, UserError) and self.connected and not self.world.leads:
            raise SystemExit(error.code)  # the first rank of the node prints it

    def leave(self) -> None:
        """Say that this rank is done; rank 0, if it keeps the store, waits up to GOODBYE seconds for the others."""
        if self.watch is None or not self.connected:
            return
        deadline = time.monotonic() + GOODBYE
        others = [beat(rank) for rank in range(1, self.world.size)]
        try:
            self.store.set(beat(self.world.rank), LEFT)
            while self.server and time.monotonic() < deadline:
                if all(value == LEFT.encode() for value in self.store.multi_get(others)):
                    return
                time.sleep(0.1)
        except dist.DistError:
            return  # rank 0 has waited long enough

    def tell(self, error: BaseException) -> None:
        """Tell the other ranks what ended this one."""
        if self.world.size == 1:
            return
        if isinstance(error, KeyboardInterrupt | Ended):
            word = f"was {ending_of(error)[0]}"
        else:
            word = f"ended: {error if isinstance(error, UserError) else told(error)}"
        try:
            if not self.connected:  # it ends before it could meet the others, who may be waiting
                self.connect(call(self.world.address, self.world.port))
            first_reason(self.store, f"{self.world.name(self.world.rank)} on {self.host} {word}")
        except (OSError, dist.DistError):
            return  # rank 0 is not there
        acknowledge(self.world, self.store)


class Waiting:
    """Report a wait: a call sleeps 0.1 s, and every EVERY seconds, from `first` seconds on, it prints whom the run
    waits for and how long. Raises NotNow after join_minutes."""

    def __init__(self, join_minutes: float, say: Callable[..., object], first: float = 0.0) -> None:
        self.minutes, self.say, self.next = join_minutes, say, first
        self.began = time.monotonic()

    def left(self) -> timedelta:
        """The time until join_minutes are over, a second at least."""
        return timedelta(seconds=max(1.0, 60 * self.minutes - (time.monotonic() - self.began)))

    def __call__(self, whom: str) -> None:
        waited = time.monotonic() - self.began
        if waited >= 60 * self.minutes:
            raise NotNow(
                f"{whom} did not come within {self.minutes:g} minutes (--join_minutes); see its output there, and if "
                "it can reach node 0"
            )
        if waited >= self.next:
            self.say(f"ranks     waiting for {whom}, {waited:.0f} s", flush=True)
            self.next += EVERY
        time.sleep(0.1)


def keep_store(port: int) -> dist.TCPStore:
    """Open the store that this process keeps; for port 0 the system chooses one."""
    try:
        return dist.TCPStore(LOOPBACK, port, None, True, timeout=ANSWER, wait_for_workers=False)
    except dist.DistNetworkError as error:
        reason = "is taken by another process" if "EADDRINUSE" in str(error) else f"cannot be opened: {told(error)}"
        raise NotNow(f"MASTER_PORT {port} {reason}; set MASTER_PORT to a free one, the same on every node") from error


def call(address: str, port: int, patience: timedelta = ANSWER) -> dist.TCPStore:
    """A connection to the store that another process keeps. Raises OSError or DistError if it is not there, or if
    it does not answer for so long, as another server at that port."""
    socket.create_connection((address, port), timeout=1).close()
    store = dist.TCPStore(address, port, None, False, timeout=min(ANSWER, patience), wait_for_workers=False)
    store.set_timeout(ANSWER)
    return store
