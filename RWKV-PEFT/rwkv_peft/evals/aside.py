"""Run third-party code without touching the run's random numbers or output."""

import io
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

import numpy as np
import torch


class OtherThreads(io.TextIOBase):
    """A stream that drops what the thread that made it writes, and passes on what other threads write, such as the
    watch over a run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.silent = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.silent else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def aside() -> Iterator[None]:
    """Within, this thread prints nothing; on exit the random states of Python, NumPy and torch are as before."""
    numbers, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with (
            torch.random.fork_rng(devices),
            redirect_stdout(OtherThreads(sys.stdout)),
            redirect_stderr(OtherThreads(sys.stderr)),
        ):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)
