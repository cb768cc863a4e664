"""The completions of one HTTP request, on their way from the engine's thread to the client."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from ..batch import DAMAGED, LOST
from ..requests import GenerationRequest, Logprobs
from ..text import Continuation
from .responses import CompletionPart, Fields, Response, Token, Usage
from .web import RequestError

GONE, LATE, FAILED = "gone", "late", "failed"  # ends: the client left, the time is over, the engine raised
ERRORS = MappingProxyType(  # messages for ends without an answer
    {
        DAMAGED: "the model's values are NaN or Inf; check its file and its adapter's",
        FAILED: "the model failed; see what the server has printed",
        LOST: "the schema became too costly to follow in the middle of the answer; make it simpler",
    }
)


class Conversation:
    """A queue of the Parts of `completions`, which have `seconds` in all, and the response made of them.

    on_first(seconds) is called with the time to the first token, on_end() at the end of each completion. `gone` is set
    once nobody waits for the rest.
    """

    def __init__(
        self,
        response: Response,
        completions: int,
        seconds: float,
        on_first: Callable[[float], object],
        on_end: Callable[[], object],
    ) -> None:
        self.response, self.left, self.on_first, self.on_end = response, completions, on_first, on_end
        self.requests: Sequence[GenerationRequest] = ()
        self.save: Callable[[], Awaitable[object]] | None = None  # called behind the last part
        self.on_part: Callable[[CompletionPart], object] = lambda part: None  # called with each part, split
        self.sampled = 0  # tokens
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.gone = threading.Event()
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[CompletionPart]()

    def put(self, part: CompletionPart) -> None:
        """Queue a part, from the engine's thread."""
        self._loop.call_soon_threadsafe(self._put, part)

    def _put(self, part: CompletionPart) -> None:
        self._queue.put_nowait(part)
        if part.end:
            self.on_end()

    async def parts(self) -> AsyncIterator[CompletionPart]:
        """Yield the parts of all completions as they come. Raises RequestError for one that failed."""
        waits = True
        while self.left:
            part = await self._queue.get()
            self.left -= bool(part.end)
            if part.end in ERRORS:
                raise RequestError(500, ERRORS[part.end])
            if part.end == LATE and waits:
                raise RequestError(503, "the time was over before the answer began; try again later")
            if part.tokens and waits:
                waits = False
                self.on_first(time.monotonic() - self.began)
            part = self.response.split_part(part)
            self.on_part(part)
            yield part
        if self.save is not None:
            await self.save()

    async def whole(self, departure: Awaitable[object]) -> Fields:
        """The body of a whole response; `departure` is done if the client leaves before. Raises RequestError as `parts`
        does."""
        reading = asyncio.ensure_future(self._joined())
        leaving = asyncio.ensure_future(departure)
        try:
            await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise RequestError(499, "the client went away")
            return self.response.whole(reading.result(), self.usage())
        finally:
            self.gone.set()
            for task in (reading, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, RequestError):
                    await task

    async def _joined(self) -> list[CompletionPart]:
        """All parts of each completion as one, in the completions' order."""
        found: dict[int, list[CompletionPart]] = {}
        async for part in self.parts():
            found.setdefault(part.number, []).append(part)
        return [CompletionPart.joined(parts) for _, parts in sorted(found.items())]

    async def stream(self) -> AsyncIterator[bytes]:
        """The bytes of a streamed response."""
        begun = False
        try:
            async for part in self.parts():
                for data in () if begun else self.response.begin(self.usage()):
                    yield data
                begun = True
                for data in self.response.events(part):
                    yield data
            for data in self.response.ending(self.usage()):
                yield data
        except RequestError as error:
            yield self.response.failure(error)

    def usage(self) -> Usage:
        prompts = sum(len(request.tokens) for request in self.requests)
        cached, thought = sum(request.cached for request in self.requests), sum(self.response.thought.values())
        return Usage(prompts, cached, self.sampled, thought)


class CompletionStream:
    """The listener for one completion, which queues its text and tokens.

    A match of `lead` at the text's beginning is dropped. opening is a text that comes first, such as the prompt.
    """

    def __init__(
        self,
        conversation: Conversation,
        number: int,
        text: Continuation,
        lead: re.Pattern[str] = re.compile(""),
        opening: str = "",
    ) -> None:
        self.conversation, self.number, self.text = conversation, number, text
        self.lead, self.opening = lead, opening
        self.put = 0  # characters

    def cancelled(self) -> str:
        if self.conversation.gone.is_set():
            return GONE
        return LATE if time.monotonic() > self.conversation.deadline else ""

    def on_token(self, token: int, logprobs: Logprobs | None) -> str:
        self.conversation.sampled += 1
        end = self.text.feed(token)
        self._put((Token(token, logprobs),))
        return end or self.cancelled()

    def on_end(self, reason: str) -> None:
        self.text.finish(reason)
        self._put((), self.text.end, self.text.stopped)

    def _put(self, tokens: tuple[Token, ...], end: str = "", stop: str = "") -> None:
        text = self.text.text
        lead = self.lead.match(text)
        new = self.opening + text[max(self.put, lead.end() if lead else 0) :]
        self.opening, self.put = "", len(text)
        self.conversation.put(CompletionPart(self.number, new, tokens, end, stop=stop))


class StateListener:
    """The listener for a completion that is requested for its prompt's state alone: at its end, `found` gets the result
    of read(), which runs in the engine's thread; None after an error."""

    def __init__(self, read: Callable[[], Any], found: "asyncio.Future[Any]") -> None:
        self.read, self.found = read, found
        self._loop = asyncio.get_running_loop()

    def cancelled(self) -> str:
        return GONE if self.found.done() else ""

    def on_token(self, token: int, logprobs: Logprobs | None) -> str:
        return ""

    def on_end(self, reason: str) -> None:
        self._loop.call_soon_threadsafe(self._set, None if reason in ERRORS else self.read())

    def _set(self, result: object) -> None:
        if not self.found.done():  # as it is if the client left
            self.found.set_result(result)
