"""The process that judges answers for `Rewards`, so that code that hangs or dies ends no run.

    rwkv_peft.rewards.child FD SPEC…      FD is its end of a pipe

It replies ("done", the rewards' names), and then to one request after the other:

    ("check", rows)        ("done", None)
    ("score", answers)     ("done", the values of each reward)

or ("failed", message). Before each call of a reward it sends ("at", (reward, first item, last item)), so that the
message on a process that hangs or dies can name them.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..children import when_parent_ends
from ..cli.errors import UserError
from ..environments.user_code import end_all, number_in, raised
from ..system import End, taken_over
from .judges import Answer, FunctionReward, Reward, reward_of


class RewardServer:
    """The rewards of a process, and the pipe to the parent."""

    def __init__(self, pipe: "End[Any, Any]") -> None:
        self.pipe = pipe
        self.rewards: list[Reward] = []

    def at(self, reward: int, first: int, last: int) -> None:
        self.pipe.send(("at", (reward, first, last)))

    def open(self, specs: Sequence[str]) -> list[str]:
        """Make the rewards -> their names."""
        for number, spec in enumerate(specs):
            self.at(number, 0, 0)
            self.rewards.append(reward_of(spec))
        return [reward.name for reward in self.rewards]

    def check(self, rows: Sequence[Any]) -> None:
        """Raise UserError for the first row that a reward refuses."""
        for place, row in enumerate(rows):
            for number, reward in enumerate(self.rewards):
                try:
                    reward.check(row)
                except UserError:
                    self.at(number, place, place)
                    raise

    def score(self, answers: Sequence[Answer]) -> list[list[float | None]]:
        """Each reward's values of the answers."""
        return [self.values(number, answers) for number in range(len(self.rewards))]

    def values(self, number: int, answers: Sequence[Answer]) -> list[float | None]:
        """One reward's values of the answers. Raises UserError if it raises, or returns anything but numbers."""
        reward, scores = self.rewards[number], []
        parts = [[answer] for answer in answers] if reward.alone else [list(answers)]
        for first, part in enumerate(parts):
            self.at(number, first, first + len(part) - 1)
            try:
                values = reward.score(part)
            except UserError:
                raise
            except (Exception, SystemExit) as error:
                file = reward.file if isinstance(reward, FunctionReward) else ""
                message = f"it raised {raised(error, file)}; mend it, or return None for what it cannot judge"
                raise UserError(message) from error
            for place, value in enumerate(values):
                try:
                    scores.append(number_in(value))
                except UserError:
                    self.at(number, first + place, first + place)
                    raise
        return scores

    def serve(self, act: Callable[[Any], object], work: Any) -> None:
        """Reply with the result of act(work), or with the message of its UserError."""
        try:
            reply = "done", act(work)
        except UserError as error:
            reply = "failed", str(error)
        self.pipe.send(reply)


def main(argv: list[str]) -> None:
    """Serve the parent until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    when_parent_ends(end_all)
    pipe = taken_over(int(argv[0]))
    server = RewardServer(pipe)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        server.serve(server.open, argv[1:])
        while True:
            kind, work = pipe.recv()
            server.serve(server.check if kind == "check" else server.score, work)
    end_all()


if __name__ == "__main__":
    main(sys.argv[1:])
