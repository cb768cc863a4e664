"""Main memory: how much of it there is, and the C library's heap, set up for large tensors that come and go."""

import ctypes
import os
import re
import sys
from pathlib import Path

# glibc's names for mallopt (malloc.h), and the largest value that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the process keep the memory that tensors free, for the next tensors; -> whether it could be set.

    By default glibc returns large blocks to the system as they are freed, so that every temporary of every step is
    made of fresh pages, which the kernel clears one by one: for elementwise work that costs more than the work.
    Memory in use does not shrink below its peak any more. Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all([mallopt(name, LARGEST) for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)])


def main_memory() -> tuple[int, int]:
    """(total, available) bytes of main memory; 0 for what the system does not tell."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return total, int(found[1]) * 1024 if found else 0
