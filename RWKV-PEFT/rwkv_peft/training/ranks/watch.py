"""Watch over a run from a thread of its own: end every process, with one message a node, if a rank ends or falls
silent, or if the run no longer moves.

Time is counted in the thread's own turns, so that a machine that slept, or a process that was stopped, does not take
others for silent.
"""

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from ..flags.world import World
from ..saving.checkpoints import how_to_go_on
from .processes import Processes

PERIOD = 1.0  # seconds per turn
SILENT = 40  # turns without a sign of life after which a rank is lost
PARTED = 5  # the same once some rank's connection has broken
FAREWELL = 5.0  # seconds that rank 0, which keeps the store, stays for the others to hear of an end
GATHER = 3.0  # seconds that ranks have to tell their places in the code
PLACES = 8  # the most ranks whose places are told
PACKAGE = str(Path(__file__).resolve().parents[1])

# keys of the store
END = "end"  # why the run ends: the first rank that knows writes it
CAME = "came"  # how many ranks have come
ACKNOWLEDGED = "acknowledged"  # how many ranks know of the end
PARENT = 5.0  # seconds for a process to end with the one that started it (processes.py)
BROKEN = "broken"  # set once a connection between ranks is broken
LEFT = "left"  # the beat of a rank that is done


def beat(rank: int) -> str:
    """The key of a rank's sign of life."""
    return f"beat/{rank}"


class Watch(threading.Thread):
    """The watch of one process. store is this thread's own connection, None if the process is alone."""

    def __init__(
        self, world: World, folder: Path, stall_minutes: float, processes: Processes, store: dist.Store | None
    ) -> None:
        super().__init__(daemon=True)
        self.world, self.folder, self.processes, self.store = world, folder, processes, store
        self.stall_minutes = stall_minutes
        self.doing, self.still, self.turn = "", 0, 0
        self.agent = os.getppid() if world.elastic else 0
        self.broken = self.frozen = False
        self.stopped = threading.Event()
        others = range(1, world.size) if world.rank == 0 else range(1)
        self.seen = dict.fromkeys(others, (b"", 0)) if store is not None else {}  # beat, turns since it changed

    def moved(self, doing: str) -> None:
        """Say that the run goes on; `doing` is told if it stops moving after this. Before the first call any time is
        allowed, because making a model's adapter may take long."""
        self.doing, self.still = doing, 0

    def explain(self) -> None:
        """Wait until the thread finds what broke a connection, which ends this process; return if it finds nothing."""
        self.broken = True
        self.join(SILENT * PERIOD)

    def stop(self) -> None:
        """Stop watching, because the run is over for this process."""
        self.stopped.set()
        self.join()

    def run(self) -> None:
        while not self.stopped.wait(PERIOD):
            reason = self.look_in_time()
            if reason and not self.stopped.is_set():
                self.end(reason)

    def look_in_time(self) -> str:
        """Look in a thread of its own, because a store whose process or machine is frozen never answers; return why the
        run must end, or ""."""
        found: list[str] = []
        looking = threading.Thread(target=lambda: found.append(self.look_or_be_lost()), daemon=True)
        looking.start()
        for _ in range(SILENT):
            looking.join(PERIOD)
            if not looking.is_alive():
                return found[0]
        self.frozen = True
        return f"{self.keeper} has not answered for {SILENT * PERIOD:.0f} seconds"

    @property
    def keeper(self) -> str:
        return f"{self.world.name(0)}, or the launcher that kept the ranks together,"

    def look_or_be_lost(self) -> str:
        """Take one turn; return why the run must end, also because the store is gone, or ""."""
        try:
            return self.look()
        except dist.DistError:
            if self.world.local_rank > 0:  # its parent is gone or ends soon, which ends it with a message
                self.stopped.wait(PARENT)
            return f"{self.keeper} is gone"

    def look(self) -> str:
        """Take one turn, and return why the run must end, or ""."""
        self.turn += 1
        self.still += 1
        if self.agent and os.getppid() != self.agent:  # who would start the others anew, but not this one
            return self.tell(f"torchrun, which had started {self.world.name(self.world.rank)}, is gone")
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
        """Return the place in the code of the first PLACES ranks, once the ranks have had GATHER seconds to tell
        theirs, and "" before; a process alone returns its own at once."""
        place = f"{self.world.name(self.world.rank)} is at {self.doing}, in {where()}"
        if self.store is None:
            return place
        self.store.set(f"place/{self.world.rank}", place)
        if self.still * PERIOD < self.stall_minutes * 60 + GATHER:
            return ""
        keys = [f"place/{rank}" for rank in range(min(self.world.size, PLACES))]
        return "; ".join(self.store.get(key).decode() for key in keys if self.store.check([key]))

    def listen(self, store: dist.Store, patience: int) -> str:
        """Read the others' signs of life; return which of them is lost, or ""."""
        beats = store.multi_get([beat(rank) for rank in self.seen])
        for (rank, (last, turns)), now in zip(self.seen.items(), beats):
            turns = 0 if now != last or now == LEFT.encode() else turns + 1
            self.seen[rank] = now, turns
            if turns >= patience:
                return self.tell(f"{self.world.name(rank)} has given no sign for {turns * PERIOD:.0f} seconds")
        return ""

    def tell(self, reason: str) -> str:
        """Tell the other ranks why the run ends -> what the first rank that knew said."""
        return reason if self.store is None else first_reason(self.store, reason)

    def end(self, reason: str) -> None:
        """End this process and those that it started."""
        if self.world.leads or self.frozen and self.world.rank == 1:  # because rank 0 cannot
            print(f"\nerror: {reason}; {how_to_go_on(self.folder)}", file=sys.stderr, flush=True)
        if self.store is not None and not self.frozen:
            acknowledge(self.world, self.store)
        self.processes.kill()
        os._exit(1)


def first_reason(store: dist.Store, reason: str) -> str:
    """Write why the run ends, unless another rank has -> the reason that stands."""
    return store.compare_set(END, "", reason).decode()


def acknowledge(world: World, store: dist.Store) -> None:
    """Say that this rank knows of the end; rank 0, which keeps the store, waits up to FAREWELL seconds for others."""
    deadline = time.monotonic() + FAREWELL
    try:
        store.add(ACKNOWLEDGED, 1)
        while world.rank == 0 and store.add(ACKNOWLEDGED, 0) < store.add(CAME, 0) and time.monotonic() < deadline:
            time.sleep(0.1)
    except dist.DistError:
        return  # the store is gone, and there is nobody to tell


def where() -> str:
    """The place in this package where the main thread is."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "another package"
    file = Path(frame.f_code.co_filename).relative_to(PACKAGE)
    return f"{file}, line {frame.f_lineno} ({frame.f_code.co_name})"
