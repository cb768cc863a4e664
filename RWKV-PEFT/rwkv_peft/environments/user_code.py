"""Python files of the user's, loaded and run in processes that may be ended: rewards and environments."""

import importlib.util
import os
import subprocess
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Pipe
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from ..children import python_command
from ..cli.errors import UserError, quoted, summarize
from ..system import End, end_group, handing

LARGEST = 1e15  # reward: sums and squares of larger ones overflow


def load(file: str) -> ModuleType:
    """Run a Python file as a module. It can import the files beside it, after everything that is installed, so that
    none of them stands in for a package. Raises UserError if the file raises."""
    path = Path(file).absolute()
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"reward of {path.stem}", path)
    assert spec is not None and spec.loader is not None  # because the name ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"the file cannot be loaded: {raised(error, file)}; mend it") from error
    return module


def raised(error: BaseException, file: str) -> str:
    """An exception of a user's file in one line, with the last line of the file that led to it."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).name == Path(file).name
    ]
    return summarize(error, named=True) + (f" ({file}, line {lines[-1]})" if lines else "")


def number_in(value: Any) -> float | None:
    """A reward as a float, None for None. Raises UserError if it is no number, or beyond LARGEST."""
    if value is None:
        return None
    with suppress(Exception):  # a value of numpy or torch; a list of several has no item
        value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, Real):
        raise UserError(f"it returned {quoted(value)}, no number; return a number, or None for what it does not judge")
    with suppress(OverflowError):
        if abs(float(value)) <= LARGEST:
            return float(value)
    raise UserError(
        f"it returned {quoted(value)}; return a finite number (up to {LARGEST:g}), or None for what it does not judge"
    )


class UserProcess:
    """A process that runs a module of this package with the end of a pipe, whose other end is `pipe`. It ends when this
    process does, and prints nowhere."""

    pipe: "End[Any, Any]"
    process: "subprocess.Popen[bytes]"

    def __init__(self, module: str, *words: str) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                python_command(module, str(theirs.fileno()), *words),
                stdin=subprocess.PIPE,  # the process ends when this one does, which closes it
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **handing(theirs),
            )

    def stop(self) -> None:
        """End the process and those that it started."""
        end_group(self.process.pid)
        self.process.wait()
        self.pipe.close()
        assert self.process.stdin is not None
        self.process.stdin.close()


def end_all() -> None:
    """End this process, and those that functions started."""
    end_group(os.getpid())
