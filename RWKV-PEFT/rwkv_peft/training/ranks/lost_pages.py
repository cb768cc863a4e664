"""Notice that a memory-mapped file became shorter and lost pages.

A thread that reads such a page gets the signal SIGBUS, and again as soon as that is handled: it gets no further, and
another thread (watch.py) has to end the process.
"""

import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...data.samples import Samples
from ...files.base import Base
from ..step.stored import StoredTeacher

REPORTS = 1 << 16  # bytes read from the pipe at once, one a signal


class LostPages:
    """Hears of SIGBUS through a pipe, into which Python's C handler writes the number of each signal. Only the main
    thread may make and close it. sizes: {path of a mapped file: bytes}."""

    def __init__(self, sizes: Mapping[str | Path, int]) -> None:
        self.sizes = sizes
        self.reports, self.pipe = os.pipe()
        os.set_blocking(self.reports, False)
        os.set_blocking(self.pipe, False)
        self.handler = signal.signal(signal.SIGBUS, lambda number, frame: None)
        self.before = signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)

    def reason(self) -> str:
        """Say which file lost pages; "" if no SIGBUS came."""
        try:
            if signal.SIGBUS not in os.read(self.reports, REPORTS):
                return ""
        except BlockingIOError:  # nothing came
            return ""
        for path, before in self.sizes.items():
            now = os.path.getsize(path) if os.path.exists(path) else 0
            if now < before:
                return (
                    f"{path} was overwritten while it is read: it has {now:,} bytes, and had {before:,}; put the old "
                    "file back"
                )
        return "a file can no longer be read (SIGBUS): was it overwritten, or is its disk or network gone?"

    def close(self) -> None:
        """Listen no more, and restore the earlier handler and pipe of signals."""
        signal.set_wakeup_fd(self.before)
        signal.signal(signal.SIGBUS, self.handler or signal.SIG_DFL)  # None: not set from Python
        os.close(self.reports)
        os.close(self.pipe)


def sizes_of_mapped(opened: Iterable[Base | StoredTeacher | None], found: Iterable[Samples]) -> dict[str | Path, int]:
    """Collect {path: bytes} of the files that a run maps: its base, its teacher or what one said, and its data."""
    sizes: dict[str | Path, int] = {file.path: file.stamp.size for file in opened if file and file.stamp}
    for samples in found:
        for part in samples.parts:
            sizes.update({path: stat.st_size for path, stat in part.dataset.mapped.items()})
    return sizes
