"""Run the engine in a thread of its own, and hand its answers to the event loop."""

import asyncio
import queue
import re
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from ..asked import Odds
from ..continuation import Continuation
from ..engine import Engine

GONE, LATE, FAILED = "gone", "late", "failed"


class Drawn(NamedTuple):
    """A token of an answer; odds are None if they were not asked for, and of a prompt's first token."""

    token: int
    odds: Odds | None


class Piece(NamedTuple):
    """The news of the answer of this number: text, tokens, and why it ended, "" while it goes on."""

    number: int
    text: str
    tokens: tuple[Drawn, ...]
    end: str = ""


class Exchange:
    """The answers to one request on their way from the engine's thread to the event loop. `gone` is set when nobody
    waits for them any more; `left` counts the answers that go on."""

    def __init__(self, answers: int, seconds: float, finished: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.left, self.finished = answers, finished
        self.drawn = 0  # tokens
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.gone = threading.Event()

    def say(self, piece: Piece) -> None:
        """Called in the engine's thread."""
        self.loop.call_soon_threadsafe(self._take, piece)

    def _take(self, piece: Piece) -> None:
        self.pieces.put_nowait(piece)
        if piece.end:
            self.finished()

    async def heard(self) -> AsyncIterator[Piece]:
        """Yield the pieces of all answers as they come."""
        while self.left:
            piece = await self.pieces.get()
            self.left -= bool(piece.end)
            yield piece


class Choice:
    """The listener of one answer: makes text of its tokens. What `lead` matches at its start is not told; opening, if
    given, makes a piece that comes before the answer, such as the prompt."""

    def __init__(
        self,
        exchange: Exchange,
        number: int,
        text: Continuation,
        lead: re.Pattern[str],
        opening: Callable[[], Piece] | None,
    ) -> None:
        self.exchange, self.number, self.text = exchange, number, text
        self.lead, self.opening = lead, opening
        self.told = 0  # characters

    def over(self) -> str:
        if self.exchange.gone.is_set():
            return GONE
        return LATE if time.monotonic() > self.exchange.deadline else ""

    def draw(self, token: int, odds: Odds | None) -> str:
        if self.opening is not None:
            self.exchange.say(self.opening())
            self.opening = None
        self.exchange.drawn += 1
        end = self.text.feed(token)
        self._say((Drawn(token, odds),))
        return end or self.over()

    def finish(self, end: str) -> None:
        self.text.finish(end)
        self._say((), self.text.end)

    def _say(self, tokens: tuple[Drawn, ...], end: str = "") -> None:
        text = self.text.text
        led = self.lead.match(text)
        new = text[max(self.told, led.end() if led else 0) :]
        self.told = len(text)
        self.exchange.say(Piece(self.number, new, tokens, end))


class Worker(threading.Thread):
    """Steps an Engine as long as it has something to do. An error ends what it was at, and the next request begins
    anew."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine = engine
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

    def call(self, act: Callable[[], object]) -> None:
        """Have act() called in the engine's thread, between two steps."""
        self._calls.put(act)

    def stop(self) -> None:
        self._calls.put(None)
        self.join()

    def run(self) -> None:
        while True:
            for act in self._due():
                if act is None:
                    return
                act()
            try:
                self.engine.step()
            except BaseException:  # a panic of a package in Rust is no Exception
                traceback.print_exc()
                self.engine.fail(FAILED)

    def _due(self) -> Sequence[Callable[[], object] | None]:
        """The calls that came; waits for one while the engine has nothing to do."""
        found = [] if self.engine.busy else [self._calls.get()]
        while not self._calls.empty():
            found.append(self._calls.get())
        return found
