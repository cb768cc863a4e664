"""Main memory: its size, and a setting of the C library's heap for large tensors that come and go."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# glibc's names for mallopt (malloc.h), and the largest value that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1
# Linux's list of the control groups of this process, and their folders: containers and batch systems limit it by them.
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# For version 2 and version 1 of control groups: the files with a group's limit and use, and the name in its memory.stat
# of the cached pages of files that the system takes back first.
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def keep_freed_memory() -> bool:
    """Let the process keep the memory that tensors free, for the next tensors; -> whether that could be set.

    By default glibc returns large blocks to the system when they are freed, so that every temporary of every step gets
    fresh pages, which the kernel clears one by one: that costs more than elementwise work itself. With this setting
    memory in use no longer shrinks below its peak. Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all([mallopt(name, LARGEST) for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)])


def main_memory() -> tuple[int, int]:
    """(total, available) bytes of main memory, of a container or batch job within its limit; 0 if it is unknown."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    available = int(found[1]) * 1024 if found else 0
    for limit, left in group_limits():
        total, available = min(total, limit), min(available or left, left, total)
    return total, available


def group_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes left of it) for each control group of this process that limits memory."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = GROUPS / "memory" if controllers else GROUPS  # version 1 has a tree for each controller
        place = top / name.lstrip("/")  # a container may not see it: there its own group is the top
        for folder in (place, *place.parents):
            if folder.is_relative_to(top):
                yield from _limit_of(folder)


def _limit_of(folder: Path) -> Iterator[tuple[int, int]]:
    for limit, used, cached in GROUP_FILES:
        try:
            told, use, stat = ((folder / name).read_text().strip() for name in (limit, used, "memory.stat"))
        except OSError:  # no such group, or not of this version
            continue
        if told.isdigit():  # else "max"
            pages = re.search(rf"^{cached} (\d+)$", stat, re.MULTILINE)
            yield int(told), max(0, int(told) - int(use) + (int(pages[1]) if pages else 0))
