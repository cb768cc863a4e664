"""Main memory: its size, and a setting of the C library's heap for large tensors that come and go."""

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# glibc's names for mallopt (malloc.h), and the largest value that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1
# Linux's list of the control groups of this process, and their folder: containers and batch systems limit it by them.
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def keep_freed_memory() -> bool:
    """Let the process keep the memory that tensors free, for the next tensors; -> True if that could be set.

    By default glibc returns large blocks to the system when they are freed, so that every temporary of every step gets
    fresh pages, which the kernel clears one by one: that costs more than elementwise work itself. With this setting
    memory in use no longer shrinks below its peak. Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all([mallopt(name, LARGEST) for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)])


def main_memory() -> tuple[int, int]:
    """(total, available) bytes of main memory, of a container or batch job within its limit."""
    import psutil  # flags are checked, and --help printed, without any package

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, left in group_limits():
        total, available = min(total, limit), min(available, left, limit)
    return total, available


def group_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes left of it) for each control group (version 2) of this process that limits memory."""
    own = re.search("^0::/(.*)$", OWN_GROUPS.read_text(), re.MULTILINE) if OWN_GROUPS.is_file() else None
    if own is None:
        return
    place = GROUPS / own[1]
    for folder in (place, *place.parents):  # a container may not see its place: there its own group is the top
        limit = folder / "memory.max"
        if folder.is_relative_to(GROUPS) and limit.is_file() and (most := limit.read_text().strip()).isdigit():
            used = int((folder / "memory.current").read_text())
            cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            yield int(most), max(0, int(most) - used + (int(cached[1]) if cached else 0))
