"""Processes of Python that a command starts, in which nothing of the current folder runs.

`python -m MODULE` and `python -c CODE` look for each module in the current folder first, so that a json.py there, which
came with somebody's data, would run. A file that is named by its path does not. This one is that file:

    python RWKV-PEFT/rwkv_peft/children.py MODULE argument…      runs a module as `python -m` does otherwise
"""

import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def python_command(module: str, *arguments: str | Path) -> list[str]:
    """The command that runs a module, of this package or another, with arguments."""
    return [sys.executable, os.path.abspath(__file__), module, *map(str, arguments)]


def guard_children() -> None:
    """Keep the current folder off the path of every Python that this process or another package starts:
    Python 3.11 and later read this variable."""
    os.environ["PYTHONSAFEPATH"] = "1"


@contextmanager
def elsewhere() -> Iterator[None]:
    """For a moment the current folder is this package's, so that other packages read nothing in the user's."""
    if sys.platform == "win32":  # which opens no folder
        path = os.getcwd()
        os.chdir(os.path.dirname(os.path.abspath(__file__)))
        yield
        os.chdir(path)
        return
    here = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))  # it may have lost its name, or not be readable
    try:
        os.chdir(os.path.dirname(os.path.abspath(__file__)))
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def import_matplotlib() -> None:
    """Import matplotlib, which reads a matplotlibrc of the current folder: one there may come with somebody's data."""
    with elsewhere():
        import matplotlib  # noqa: F401


def when_parent_ends(act: Callable[[], None]) -> None:
    """Call act() in a thread when the process that started this one, and holds the other end of its standard input, is
    gone, however it ended."""

    def watch() -> None:
        os.read(0, 1)
        act()

    threading.Thread(target=watch, daemon=True).start()


def when_orphaned(act: Callable[[], None]) -> None:
    """Call act() in a thread when the process that started this one is gone, also one that holds no end of its standard
    input, such as torchrun."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        act()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the folder of this file, whose modules are the package's
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
