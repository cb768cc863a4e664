"""Bounds on what a process may take, so that a file's claim of gigabytes fails here, and at once."""

import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_bound(room):
    """Let the process take at most `room` bytes more than it has, if the system can limit it."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
