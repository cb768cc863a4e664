"""Environments of conversations over several turns: their tools, their conversations, each in a process of its own
(child.py), with a limit of time for each request."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Pipe, wait
from multiprocessing.reduction import send_handle
from typing import Any, NamedTuple

from ..cli.errors import UserError, field_names
from ..data.tools import ToolCall
from ..system import End, can_fork, end_group, read_part
from .user_code import UserProcess

SECONDS = 60.0  # that a tool, a reset or a score may take
LOADING = 60.0  # seconds that the classes' files may take to load
PIECE = 1 << 16  # bytes of a message that are read at a time
FIELD = "environment"  # of a row, the name of its environment if there are several


class FailedRequest(NamedTuple):
    """The message of a request that failed, in place of its reply."""

    message: str


class Environment(NamedTuple):
    """An environment: the schemas of its tools, the fields of a row that reset takes, and True if it scores
    conversations."""

    tools: list[dict[str, Any]]
    required: list[str]
    scores: bool


class Place:
    """A process that holds one conversation at a time of an environment; `lost` is the reason if it is gone."""

    def __init__(self, name: str, pipe: "End[Any, Any]", child: UserProcess | None = None) -> None:
        self.name, self.pipe, self.child, self.lost = name, pipe, child, ""
        self.process = 0
        self.read = b""  # of the line that its next message is

    def end(self, reason: str) -> None:
        """End the process, and those that a tool started."""
        self.lost = reason
        self.pipe.close()
        if self.child is not None:
            self.child.stop()
        elif self.process:
            end_group(self.process)


class Environments(UserProcess):
    """Environments by the words of a flag, which messages name; use `Environments.open`."""

    def __init__(self, specs: Sequence[str], timeout: float, flag: str) -> None:
        names = [name if (name := spec.partition("=")[0]).isidentifier() and name != spec else "" for spec in specs]
        words = [spec if name else f"={spec}" for name, spec in zip(names, specs)]
        self.timeout, self.flag = timeout, flag
        self.words = ("rwkv_peft.environments.child", *words)
        super().__init__(*self.words)
        self.pipe.send(None)
        self.known: dict[str, Environment] = {}
        self.free: dict[str, list[Place]] = {}
        self.places: list[Place] = []

    @classmethod
    @contextmanager
    def open(
        cls, specs: Sequence[str], *, timeout: float = SECONDS, flag: str = "--environment"
    ) -> "Iterator[Environments]":
        """Within, have the Environments. Raises UserError for mistakes in a word, and in the class that it names."""
        environments = cls(specs, timeout, flag)
        try:
            if not environments.pipe.poll(LOADING):
                raise UserError(f"{flag} {' '.join(specs)}: loading takes longer than {LOADING:g} seconds")
            try:
                kind, content = environments.pipe.recv()
            except (EOFError, ConnectionResetError):
                kind, content = "failed", f"{' '.join(specs)}: its file ends the process that loads it"
            if kind == "failed":
                raise UserError(f"{flag} {content}")
            environments.known = {name: Environment(*each) for name, each in content.items()}
            yield environments
        finally:
            environments.stop()

    @property
    def scoring(self) -> bool:
        """True if one of them scores conversations."""
        return any(each.scores for each in self.known.values())

    def of_row(self, row: Mapping[str, Any]) -> str:
        """The name of a row's environment. Raises UserError if the row names none of several, or lacks what reset
        takes."""
        name = "" if "" in self.known else row.get(FIELD)
        if name not in self.known:
            raise UserError(
                f"its {FIELD} is {name!r}, and there is {', '.join(self.known)} (--environment); name one in the row"
            )
        if missing := [each for each in self.known[name].required if each not in row]:
            raise UserError(
                f"reset of its environment takes {', '.join(missing)}, and the row has the fields {field_names(row)}; "
                "add the field, or give the parameter a default"
            )
        return str(name)

    def check_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raise UserError for the first row that no environment takes, with its number from 1."""
        for number, row in enumerate(rows, 1):
            try:
                self.of_row(row)
            except UserError as error:
                raise UserError(f"--environment: row {number}: {error}") from None

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Place], list[str | FailedRequest]]:
        """Begin a conversation of each row -> their places, and the texts that the prompts end with."""
        places = [self.place(self.of_row(row)) for row in rows]
        fields = [{name: value for name, value in row.items() if name != FIELD or "" in self.known} for row in rows]
        return places, self.replies(places, [("reset", each) for each in fields])

    def call(self, places: Sequence[Place], calls: Sequence[ToolCall]) -> list[str]:
        """The results of a call at each place, as texts. A tool that takes too long, or ends its process, ends the
        conversation there, and its result says so."""
        results = self.replies(places, [("call", (call.name, call.arguments)) for call in calls])
        return [f"error: {each.message}" if isinstance(each, FailedRequest) else each for each in results]

    def scores(self, places: Sequence[Place]) -> list[float | FailedRequest | None]:
        """The scores of finished conversations; None without get_reward, and where the process is lost."""
        scored = [place for place in places if self.known[place.name].scores and not place.lost]
        scores = dict(zip(scored, self.replies(scored, [("score", None)] * len(scored))))
        return [scores.get(place) for place in places]

    def states(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        """The attributes of each place's instance that JSON holds; {} where the process is lost."""
        states = self.replies(places, [("state", None)] * len(places))
        return [{} if isinstance(each, FailedRequest) else json.loads(each) for each in states]

    def release(self, places: Sequence[Place]) -> None:
        """Keep the processes of finished conversations for others."""
        for place in places:
            if not place.lost:
                self.free[place.name].append(place)

    def place(self, name: str) -> Place:
        """A place of an environment that holds no conversation, a new one if none is free."""
        if free := self.free.setdefault(name, []):
            return free.pop()
        self.places = [place for place in self.places if not place.lost]
        if can_fork():
            ours, theirs = Pipe()
            with theirs:
                self.pipe.send(name)
                send_handle(self.pipe, theirs.fileno(), self.process.pid)
            place = Place(name, ours)
        else:
            child = UserProcess(*self.words)
            child.pipe.send(name)
            place = Place(name, child.pipe, child)
        self.places.append(place)
        return place

    def replies(self, places: Sequence[Place], requests: Sequence[tuple[str, Any]]) -> list[Any]:
        """Send a request to each place at once -> the replies; a FailedRequest for one that failed, took too long or
        ended, whose place is lost then."""
        answers: dict[Place, Any] = {}
        for place, request in zip(places, requests, strict=True):
            if place.lost:
                answers[place] = FailedRequest(place.lost)
                continue
            with suppress(BrokenPipeError, ConnectionResetError):  # the reply shows it
                place.pipe.send(request)
        begins = any(place.child and not place.process for place in places)  # and loads the class
        deadline = time.monotonic() + self.timeout + (LOADING if begins else 0)
        while waiting := [place for place in places if place not in answers]:
            ready = wait([place.pipe for place in waiting], max(0.0, deadline - time.monotonic()))
            for place in waiting:
                if place.pipe in ready:
                    self.receive(place, answers)
                elif not ready:
                    place.end(f"it takes longer than {self.timeout:g} seconds, and its conversation is lost")
                    answers[place] = FailedRequest(place.lost)
        return [answers[place] for place in places]

    def receive(self, place: Place, found: dict[Place, Any]) -> None:
        """Read what a place has sent, and take its messages: its process's number, or a reply.

        A message is a line of JSON, of which any part may have come: a process that a tool started writes here too."""
        try:
            part = read_part(place.pipe, PIECE)
        except ConnectionResetError:
            part = b""
        *lines, place.read = (place.read + part).split(b"\n")
        try:
            for line in lines:
                kind, content = json.loads(line)
                if kind == "process":
                    place.process = content
                elif place in found or kind not in ("done", "failed"):
                    raise ValueError("no reply is due")
                else:
                    found[place] = whole(content) if kind == "done" else FailedRequest(str(whole(content)))
        except (ValueError, TypeError):
            place.end("what its process sent is no reply, and its conversation is lost")
        if not part:
            place.end("its process ended, and its conversation is lost")
        if place.lost:
            found[place] = FailedRequest(place.lost)

    def stop(self) -> None:
        """End all processes."""
        for place in self.places:
            place.end("the run is over")
        super().stop()


def whole(content: Any) -> Any:
    """A reply in which U+FFFD stands for each half of a character, as a model's call may leave in a text."""
    halves = isinstance(content, str) and not content.isascii()
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if halves else content
