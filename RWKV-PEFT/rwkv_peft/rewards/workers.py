"""The process that judges answers (child.py), with a limit of time."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe
from typing import Any, NamedTuple

from ..children import python_command

LOADING = 60.0  # seconds that a process may take at least to begin, to load each file, and to take a request


class Place(NamedTuple):
    """The call that a process is in: the numbers of the reward, and of the first and the last item that it is given."""

    reward: int
    first: int
    last: int


class Failure(Exception):
    """A process that failed, at a Place, and why in words."""

    def __init__(self, place: Place, words: str) -> None:
        super().__init__(words)
        self.place, self.words = place, words


class Worker:
    """A process that judges by `specs`. A call of a reward may take `seconds`."""

    def __init__(self, specs: Sequence[str], seconds: float) -> None:
        self.seconds, self.first, self.place = seconds, 0, Place(0, 0, 0)
        self.pipe, theirs = Pipe()
        with theirs:
            command = python_command("rwkv_peft.rewards.child", str(theirs.fileno()), str(seconds), *specs)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # the process ends when this one does, which closes it
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.call = self.limit = max(seconds, LOADING)
        self.since = time.monotonic()

    def send(self, kind: str, work: Sequence[object], first: int = 0) -> None:
        """Send a request about items, of which `first` come before. A process that is gone is noticed by its reply."""
        self.first, self.place = first, Place(0, first, first + len(work) - 1)
        self.call, self.limit, self.since = self.seconds, max(self.seconds, LOADING), time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((kind, work))

    @property
    def left(self) -> float:
        """The seconds that are left for what the process is at."""
        return max(0.0, self.since + self.limit - time.monotonic())

    def reply(self) -> Any:
        """Wait for the reply. Raises Failure if the process fails, takes too long, or is gone."""
        while True:
            if not self.pipe.poll(self.left):
                raise Failure(self.place, f"it takes longer than {self.limit:g} seconds; make it faster")
            try:
                kind, told = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                raise Failure(self.place, self.ending()) from None
            if kind == "failed":
                raise Failure(self.place, told)
            if kind == "done":
                return told
            reward, first, last = told
            self.place = Place(reward, self.first + first, self.first + last)
            self.limit, self.since = self.call, time.monotonic()

    def ending(self) -> str:
        """Say how the process ended."""
        code = self.process.wait()
        if code == -signal.SIGKILL:
            how = "was killed, as the system does when memory runs out"
        else:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process that judges {how}; mend the reward, which must return"

    def stop(self) -> None:
        """End the process and those that it started; its pipe is closed once whoever waits for a reply has noticed."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
