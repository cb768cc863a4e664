"""Watches over a run from a thread of its own: a rank that ends or falls silent, and a run that no longer moves, end
every process with one message a node.

Time is counted in the thread's own turns, so that a machine that sleeps, or a stopped process, is taken for no silence
of others.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from .checkpoints import how_to_go_on
from .lost_pages import LostPages
from .processes import Processes
from .world import World

PERIOD = 1.0  # seconds a turn
SILENT = 40  # turns without a sign after which a rank is lost,
PARTED = 5  # and where some rank's connection has broken already
FAREWELL = 5.0  # seconds that rank 0, which keeps the store, stays for the others to hear of an end
GATHER = 3.0  # seconds that ranks have to tell where they are,
PLACES = 8  # and how many of them are worth reading
PACKAGE = str(Path(__file__).resolve().parents[1])

# keys of the store
END = "end"  # why the run ends: the first rank that knows writes it
CAME = "came"  # how many ranks have come,
ACKNOWLEDGED = "acknowledged"  # and how many know of the end
PARENT = 5.0  # seconds for a process to be ended with the one that started it (processes.py)
BROKEN = "broken"  # that a connection between ranks is
LEFT = "left"  # what a rank that is done writes as its beat


def beat(rank: int) -> str:
    """The key of a rank's sign of life."""
    return f"beat/{rank}"


class Watch(threading.Thread):
    """Of one process. store is None where there is one process alone; it is this thread's own connection."""

    def __init__(
        self, world: World, folder: Path, stall_minutes: float, processes: Processes, store: dist.Store | None
    ) -> None:
        super().__init__(daemon=True)
        self.world, self.folder, self.processes, self.store = world, folder, processes, store
        self.stall_minutes = stall_minutes
        self.doing, self.still, self.turn = "", 0, 0
        self.broken = False
        self.stopped = threading.Event()
        self.lost_pages: LostPages | None = None
        others = range(1, world.size) if world.rank == 0 else range(1)
        self.seen = dict.fromkeys(others, (b"", 0)) if store is not None else {}  # beat, turns since it changed

    def moved(self, doing: str) -> None:
        """The run goes on; `doing` is told where it does not any more. Before the first call any time is allowed: to
        make a model's adapter may take long."""
        self.doing, self.still = doing, 0

    def explain(self) -> None:
        """Wait for what broke a connection to be found, which ends this process; returns where nothing is found."""
        self.broken = True
        self.join(SILENT * PERIOD)

    def watch_files(self, sizes: Mapping[str | Path, int]) -> None:
        """Hear of it where one of the mapped files, given by path and size, becomes shorter. For the main thread."""
        self.lost_pages = LostPages(sizes)

    def stop(self) -> None:
        """The run is over for this process: watch no more."""
        self.stopped.set()
        self.join()
        if self.lost_pages is not None:
            self.lost_pages.close()

    def run(self) -> None:
        while not self.stopped.wait(PERIOD):
            try:
                reason = self.look()
            except dist.DistError:
                reason = f"{self.world.name(0)}, or the launcher that kept the ranks together, is gone"
                if self.world.local_rank > 0:  # who started this process is gone or ends soon, which ends it, in words
                    self.stopped.wait(PARENT)
            if reason and not self.stopped.is_set():
                self.end(reason)

    def look(self) -> str:
        """Why the run must end, or ""."""
        self.turn += 1
        self.still += 1
        if self.lost_pages is not None and (reason := self.lost_pages.reason()):
            return self.tell(reason)
        stalled = self.doing and 0 < self.stall_minutes * 60 <= self.still * PERIOD
        if stalled and (places := self.places()):
            return self.tell(f"nothing has moved for {self.stall_minutes:g} minutes (--stall_minutes): {places}")
        if failed := self.processes.failed():
            rank, how = failed
            return self.tell(f"{self.world.name(rank)} {how}")
        if self.store is None:
            return ""
        self.store.set(beat(self.world.rank), str(self.turn))
        if self.store.check([END]):
            return self.tell("")
        if self.broken:
            self.store.set(BROKEN, "")
        return self.listen(self.store, PARTED if self.store.check([BROKEN]) else SILENT)

    def places(self) -> str:
        """Where this rank is, and where the others are, once they have had the time to tell; "" before."""
        place = f"{self.world.name(self.world.rank)} is at {self.doing}, in {where()}"
        if self.store is None:
            return place
        self.store.set(f"place/{self.world.rank}", place)
        if self.still * PERIOD < self.stall_minutes * 60 + GATHER:
            return ""
        keys = [f"place/{rank}" for rank in range(min(self.world.size, PLACES))]
        return "; ".join(self.store.get(key).decode() for key in keys if self.store.check([key]))

    def listen(self, store: dist.Store, patience: int) -> str:
        """Take in the others' signs; which of them is lost, or ""."""
        beats = store.multi_get([beat(rank) for rank in self.seen])
        for (rank, (last, turns)), now in zip(self.seen.items(), beats):
            turns = 0 if now != last or now == LEFT.encode() else turns + 1
            self.seen[rank] = now, turns
            if turns >= patience:
                return self.tell(f"{self.world.name(rank)} has given no sign for {turns * PERIOD:.0f} seconds")
        return ""

    def tell(self, reason: str) -> str:
        """Let the other ranks know; -> what the first that knew said."""
        return reason if self.store is None else first_reason(self.store, reason)

    def end(self, reason: str) -> None:
        """End this process and those that it started."""
        if self.world.leads:
            print(f"\nerror: {reason}; {how_to_go_on(self.folder)}", file=sys.stderr, flush=True)
        if self.store is not None:
            acknowledge(self.world, self.store)
        self.processes.kill()
        os._exit(1)


def first_reason(store: dist.Store, reason: str) -> str:
    """Write why the run ends, unless another rank has; -> what stands there."""
    return store.compare_set(END, "", reason).decode()


def acknowledge(world: World, store: dist.Store) -> None:
    """Say that the end is known; rank 0, which keeps the store, stays a while for the others to know it too."""
    deadline = time.monotonic() + FAREWELL
    try:
        store.add(ACKNOWLEDGED, 1)
        while world.rank == 0 and store.add(ACKNOWLEDGED, 0) < store.add(CAME, 0) and time.monotonic() < deadline:
            time.sleep(0.1)
    except dist.DistError:
        return  # who kept it is gone, and there is nobody to tell


def where() -> str:
    """The place in this package where the main thread is."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "another package"
    file = Path(frame.f_code.co_filename).relative_to(PACKAGE)
    return f"{file}, line {frame.f_lineno} ({frame.f_code.co_name})"
