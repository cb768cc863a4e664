"""The rewards of a run: they judge completions in a process of their own (child.py), with a limit of time for each
call, and are summed up with weights."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, NamedTuple

from ..cli.errors import UserError
from ..environments.user_code import UserProcess
from .judges import Answer

SECONDS = 60.0  # that a call of a reward may take
LOADING = 60.0  # seconds that a process may take at least to begin, to load each file, and to take a request
ROWS = 1000  # rows that are checked at a time
WORDS = 60  # characters of a prompt that a message quotes


class Judged(NamedTuple):
    """The numbers of answers: their weighted sums, None if no reward judges one, and each reward's own by its name."""

    total: list[float | None]
    each: dict[str, list[float | None]]

    def spread(self, places: Sequence[int], number: int) -> "Judged":
        """The numbers at these places among so many answers, with None for the others."""
        totals, each = dict(zip(places, self.total)), {name: dict(zip(places, of)) for name, of in self.each.items()}
        every = range(number)
        return Judged(list(map(totals.get, every)), {name: list(map(of.get, every)) for name, of in each.items()})


class JudgeCall(NamedTuple):
    """The call that the process is in: the reward's number, and the first and the last item that it is given."""

    reward: int
    first: int
    last: int


class Rewards(UserProcess):
    """Judges of completions, by the words of --reward with a weight each; use `Rewards.open`. names are the rewards',
    in order. A reward may take `timeout` seconds for the answers that it is given at once: all answers of a request if
    it is a function, else one."""

    def __init__(self, specs: Sequence[str], weights: Sequence[float], timeout: float) -> None:
        self.specs, self.weights, self.timeout = specs, weights, timeout
        super().__init__("rwkv_peft.rewards.child", *specs)
        self.call, self.seconds, self.since = JudgeCall(0, 0, 0), max(timeout, LOADING), time.monotonic()
        self.call_seconds = self.seconds  # of each call, here of loading a file
        self.names: list[str] = []

    @classmethod
    @contextmanager
    def open(
        cls, specs: Sequence[str], weights: Sequence[float] = (), *, timeout: float = SECONDS
    ) -> "Iterator[Rewards]":
        """Within, have the Rewards; a weight is 1 if none are given. Raises UserError for mistakes in a word, and in
        the file that it names."""
        rewards = cls(specs, weights or [1.0] * len(specs), timeout)
        try:
            rewards.names = numbered(rewards.reply(lambda call: ""))
            yield rewards
        finally:
            rewards.stop()

    def check_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raise UserError for the first row that a reward refuses, with its number from 1."""
        waiting, first = iter(rows), 0

        def place(call: JudgeCall) -> str:
            return f"row {first + call.first + 1}: "

        while part := list(islice(waiting, ROWS)):
            self.send("check", part)
            self.reply(place)
            first += len(part)

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        states: Sequence[Mapping[str, Any]] = (),
    ) -> Judged:
        """Judge the completions of prompts, each with the row of its prompt, and with the attributes of its environment
        if there is one. Raises UserError if a reward fails, which names the answer; the Rewards judge no more after
        that."""
        seen = zip(prompts, completions, rows, states or [{}] * len(rows), strict=True)
        answers = [Answer(*one) for one in seen]
        self.send("score", answers)
        each = dict(zip(self.names, self.reply(lambda call: place_of(answers, call))))
        return Judged([self.total(values) for values in zip(*each.values())], each)

    def total(self, values: Sequence[float | None]) -> float | None:
        """The weighted sum of the rewards of an answer."""
        weighted = [weight * value for weight, value in zip(self.weights, values, strict=True) if value is not None]
        return sum(weighted) if weighted else None

    def send(self, kind: str, items: Sequence[object]) -> None:
        """Send a request about items. The reply shows if the process is gone."""
        self.call = JudgeCall(0, 0, len(items) - 1)
        self.call_seconds, self.seconds, self.since = self.timeout, max(self.timeout, LOADING), time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((kind, items))

    @property
    def left(self) -> float:
        """The seconds that are left for the call."""
        return max(0.0, self.since + self.seconds - time.monotonic())

    def reply(self, place: Callable[[JudgeCall], str]) -> Any:
        """Wait for the reply. Raises UserError, with the place of the JudgeCall, if the process fails, takes too long,
        or is gone."""
        while True:
            if not self.pipe.poll(self.left):
                kind, content = "failed", f"it takes longer than {self.seconds:g} seconds; make it faster"
            else:
                try:
                    kind, content = self.pipe.recv()
                except (EOFError, ConnectionResetError):
                    kind, content = "failed", self.ending()
            if kind == "failed":
                raise UserError(f"--reward {self.specs[self.call.reward]}: {place(self.call)}{content}")
            if kind == "done":
                return content
            self.call, self.seconds, self.since = JudgeCall(*content), self.call_seconds, time.monotonic()

    def ending(self) -> str:
        """The message on a process that ended."""
        code = self.process.wait()
        if code == -9:  # SIGKILL
            how = "was killed, as the system does when memory runs out"
        else:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process that judges {how}; mend the reward, which must return"


def place_of(answers: Sequence[Answer], call: JudgeCall) -> str:
    """The answers of a call, at the head of a message."""
    first, last = call.first + 1, call.last + 1
    which = f"answer {first}" if first == last else f"answers {first} to {last}"
    words = " ".join(answers[call.first].prompt.split())
    return f"{which} of {len(answers)} ({words if len(words) <= WORDS else f'{words[:WORDS]}…'!r}): "


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number if they repeat an earlier one."""
    unique: list[str] = []
    for name in names:
        times, other = 2, name
        while other in unique:
            other, times = f"{name} {times}", times + 1
        unique.append(other)
    return unique
