"""The rewards of a run: several judges of answers, and the weighted sum of what they say."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from ..cli.errors import UserError
from .reward import Answer, beginning
from .workers import Failure, Place, Worker

SECONDS = 60.0  # that a call of a reward may take
ROWS = 1000  # rows that are checked at a time
LEVELS = 100  # of lists and objects within each other: Python's pickle, which sends them, stops at some 300


class Judged(NamedTuple):
    """The numbers of answers: their weighted sums, None if no reward judges one, and each reward's own by its name."""

    total: list[float | None]
    each: dict[str, list[float | None]]


class Rewards:
    """Judges answers in a process of its own, from `Rewards.open` on. names are those of the rewards, in order."""

    def __init__(self, specs: Sequence[str], weights: Sequence[float], worker: Worker, listener: Executor) -> None:
        self.specs, self.weights, self.worker, self.listener = specs, weights, worker, listener
        self.asked: Future[Any] | None = None
        try:
            self.names = numbered(worker.reply())
        except Failure as failure:
            raise self.refusal(failure) from None

    @classmethod
    @contextmanager
    def open(
        cls, specs: Sequence[str], weights: Sequence[float] = (), *, timeout: float = SECONDS
    ) -> "Iterator[Rewards]":
        """Open the rewards that the words of --reward name, with a weight each (1 if none are given). A reward may take
        `timeout` seconds for the answers that it is given at once: all of a call if it is a function, else one. Raises
        UserError for what is wrong with a word, and with what it names."""
        with ThreadPoolExecutor(1, "rewards") as listener:  # which ends when the process has
            worker = Worker(specs, timeout)
            try:
                yield cls(specs, weights or [1.0] * len(specs), worker, listener)
            finally:
                worker.stop()

    def check_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raise UserError for the first row to which a reward cannot judge answers, with its number from 1."""
        waiting, first = iter(rows), 0
        while part := list(islice(waiting, ROWS)):
            if (number := next((n for n, row in enumerate(part, first + 1) if is_deep(row)), None)) is not None:
                raise UserError(
                    f"--reward: row {number} has more than {LEVELS} lists and objects within each other; flatten it"
                )
            self.worker.send("check", part, first)
            try:
                self.worker.reply()
            except Failure as failure:
                raise self.refusal(failure, f"row {failure.place.first + 1}: ") from None
            first += len(part)

    def judge(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Judged:
        """Judge the completions of prompts, each with the row of its prompt. Raises UserError if a reward fails, with
        the answer at which it does; the Rewards judge no more after that."""
        return self.ask(prompts, completions, rows)()

    def ask(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Callable[[], Judged]:
        """Begin to judge completions, as judge does, once those that were asked about before are judged -> a function
        that waits for the judgement. A thread listens to the process meanwhile."""
        answers = [Answer(*one) for one in zip(prompts, completions, rows, strict=True)]
        if self.asked is not None:
            wait([self.asked])
        self.worker.send("judge", answers)
        asked = self.asked = self.listener.submit(self.worker.reply)

        def judgement() -> Judged:
            try:
                found = asked.result()
            except Failure as failure:
                raise self.refusal(failure, told_place(answers, failure.place)) from None
            each = dict(zip(self.names, found))
            return Judged([self.total(values) for values in zip(*each.values())], each)

        return judgement

    def total(self, values: Sequence[float | None]) -> float | None:
        """The weighted sum of what the rewards say of an answer."""
        said = [weight * value for weight, value in zip(self.weights, values, strict=True) if value is not None]
        return sum(said) if said else None

    def refusal(self, failure: Failure, place: str = "") -> UserError:
        return UserError(f"--reward {self.specs[failure.place.reward]}: {place}{failure.words}")


def is_deep(value: object, levels: int = LEVELS) -> bool:
    """Whether a value of JSON has more lists and objects within each other than `levels`."""
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    return inside is not None and (not levels or any(is_deep(one, levels - 1) for one in inside))


def told_place(answers: Sequence[Answer], place: Place) -> str:
    """Name the answers that a reward was given, at the head of a message."""
    first, last = place.first + 1, place.last + 1
    which = f"answer {first}" if first == last else f"answers {first} to {last}"
    return f"{which} of {len(answers)} ({beginning(answers[place.first].prompt)}): "


def numbered(names: Sequence[str]) -> list[str]:
    """Make names differ: those that repeat an earlier one have a number."""
    found: list[str] = []
    for name in names:
        times = 2
        other = name
        while other in found:
            other, times = f"{name} {times}", times + 1
        found.append(other)
    return found
