"""The process that judges answers for `Rewards`, so that code which hangs or dies there takes no run with it.

    rwkv_peft.rewards.child FD SECONDS SPEC…      FD is its end of a pipe

It says ("done", the rewards' names), and then replies to one request after the other:

    ("check", rows)        ("done", None)
    ("judge", answers)     ("done", the values of each reward)

or ("failed", words). Before that, and before each call of a reward, it says ("at", (reward, first item, last item)), so
that this is known if it is heard of no more.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from numbers import Real
from typing import Any

from ..children import when_parent_ends
from ..cli.errors import UserError, quoted
from .functions import FunctionReward, raised
from .reward import Answer, Reward
from .tasks import reward_of

LARGEST = 1e15  # reward: sums and squares of larger ones overflow
GRACE = 30  # seconds after which a process ends itself that its parent should have ended


class Bench:
    """The rewards of a process, the seconds that each call may take, and the pipe to the process that asks."""

    def __init__(self, pipe: "Connection[Any, Any]", seconds: float) -> None:
        self.pipe, self.seconds = pipe, seconds
        self.rewards: list[Reward] = []

    def at(self, reward: int, first: int, last: int) -> None:
        # a thread of C ends the process then: neither signals nor threads of Python come through a regular expression
        faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True)
        self.pipe.send(("at", (reward, first, last)))

    def open(self, specs: Sequence[str]) -> list[str]:
        """Make the rewards; -> their names."""
        for number, spec in enumerate(specs):
            self.at(number, 0, 0)
            self.rewards.append(reward_of(spec))
        return [reward.name for reward in self.rewards]

    def check(self, rows: Sequence[Any]) -> None:
        """Raise UserError for the first row to which a reward cannot judge answers."""
        for place, row in enumerate(rows):
            for number, reward in enumerate(self.rewards):
                try:
                    reward.check(row)
                except UserError:
                    self.at(number, place, place)
                    raise

    def judge(self, answers: Sequence[Answer]) -> list[list[float | None]]:
        """Ask each reward for its numbers of the answers."""
        return [self.values(number, answers) for number in range(len(self.rewards))]

    def serve(self, act: Callable[[Any], object], work: Any) -> None:
        """Reply with the result of act(work), or tell why there is none."""
        try:
            reply = "done", act(work)
        except UserError as error:
            reply = "failed", str(error)
        faulthandler.cancel_dump_traceback_later()
        self.pipe.send(reply)

    def values(self, number: int, answers: Sequence[Answer]) -> list[float | None]:
        """Ask a reward for its numbers of the answers. Raises UserError if it raises, or returns another thing."""
        reward, found = self.rewards[number], []
        parts = [[answer] for answer in answers] if reward.alone else [list(answers)]
        for first, part in enumerate(parts):
            self.at(number, first, first + len(part) - 1)
            try:
                values = reward.judge(part)
            except (Exception, SystemExit) as error:
                self.find_culprit(number, part)
                raise told_failure(reward, error) from error
            for place, value in enumerate(values):
                try:
                    found.append(number_in(value))
                except UserError:
                    self.at(number, first + place, first + place)
                    raise
        return found

    def find_culprit(self, number: int, answers: Sequence[Answer]) -> None:
        """Call a reward that failed with each answer alone, and stop at the first with which it fails again; if it
        fails with none, all of them are what it was at."""
        if len(answers) < 2:
            return
        for place, answer in enumerate(answers):
            self.at(number, place, place)
            try:
                self.rewards[number].judge([answer])
            except (Exception, SystemExit):
                return
        self.at(number, 0, len(answers) - 1)


def told_failure(reward: Reward, error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    file = reward.file if isinstance(reward, FunctionReward) else ""
    return UserError(f"it raised {raised(error, file)}; mend it, or return None for what it cannot judge")


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


def main(argv: list[str]) -> None:
    """Serve one process until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    when_parent_ends(end_all)
    os.set_inheritable(int(argv[0]), False)
    pipe: Connection[Any, Any] = Connection(int(argv[0]))
    bench = Bench(pipe, float(argv[1]))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the pipe may tell of the parent's end first
        bench.serve(bench.open, argv[2:])
        while True:
            kind, work = pipe.recv()
            bench.serve(bench.check if kind == "check" else bench.judge, work)
    end_all()


def end_all() -> None:
    """End this process, and those that functions started."""
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
