"""Answers requests: gives them places, has the engine draw, and tells what it draws."""

import argparse
import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from ...cli.errors import UserError
from ...data.turns import OPENINGS
from ..asked import Answer, Odds, Request
from ..continuation import Continuation
from ..engine import Engine
from ..known import Known
from ..pace import Pace
from ..settings import Sampling
from ..voices import Voice
from .asking import Asking, Bounds, Prompt, asking_of
from .catalog import Catalog
from .forms import ChatAsked, TextAsked
from .gate import Refused
from .metrics import Metrics
from .schema import Compiled, Schemas
from .telling import BROKEN, ChatTeller, Teller, TextTeller, Usage, event, joined
from .worker import LATE, Choice, Drawn, Exchange, Piece, Worker

Read = TypeVar("Read")
# ChatAsked.think, None for a text -> what an answer begins with that is not told
LEADS = MappingProxyType(
    {None: re.compile(""), "": re.compile(r"\s*"), "on": re.compile(""), "off": re.compile(r"\s*>?\s*")}
)

LONG_BODY = 1 << 16  # bytes: of longer bodies one is tokenized at a time, because tokenizers let nothing else run
PIECE, STEP_SECONDS = 64, 0.1  # tokens that are read at first between two that are drawn, and how long that may take


class Service:
    """State that the routes share. answers: those that wait or are being drawn; places: the most of them."""

    def __init__(self, args: argparse.Namespace, defaults: Sampling, catalog: Catalog) -> None:
        self.catalog, self.defaults, self.seconds = catalog, defaults, args.max_seconds
        vocabulary = min(catalog.tokenizer.vocab_size, catalog.own.model.config.vocab_size)
        self.bounds = Bounds(args.batch, args.max_prompt, args.max_tokens, vocabulary, catalog.clean)
        self.places, self.answers = args.batch + args.queue, 0
        self.metrics = Metrics()
        self.schemas = Schemas(catalog.tokenizer, vocabulary)
        self.compiling, self.reading = asyncio.Lock(), asyncio.Lock()  # waiting threads would be missing elsewhere
        known, ahead = Known(args.known_mib << 20), catalog.own.model.emb.weight.is_cuda
        self.worker = Worker(Engine(vocabulary, args.batch, known, Pace(PIECE, STEP_SECONDS), ahead))

    async def ask(self, form: TextAsked | ChatAsked, size: int) -> "Conversation":
        """Give a request, whose body has `size` bytes, its places, and have it answered. Raises Refused."""
        schema = None
        if isinstance(form, ChatAsked) and (form.response_format or form.must_call):
            async with self.compiling:
                schema = await asyncio.to_thread(self.schemas.compiled, form)
        voice = self.catalog.voice(form.model, form.state)
        asking = await self.read(size, asking_of, form, self.catalog.tokenizer, self.defaults, self.bounds)
        due = len(asking.prompts) * asking.times
        if self.answers + due > self.places:
            raise Refused(429, "all places are taken; try again later", code="rate_limit_exceeded")
        head = voice.name, self.catalog.tokenizer, asking.odds is not None
        teller = ChatTeller(*head, form.calls) if isinstance(form, ChatAsked) else TextTeller(*head)
        exchange = Exchange(due, self.seconds, self._finished)
        try:
            requests = [
                self._request(form, voice, asking, place, exchange, schema) for place in range(len(asking.prompts))
            ]
        except UserError as error:
            raise Refused(400, str(error), "stop") from error
        self.answers += due
        for request in requests:
            self.worker.call(partial(self.worker.engine.add, request))
        return Conversation(exchange, requests, teller, self.metrics, form.tells_usage)

    async def read(self, size: int, act: Callable[..., Read], *arguments: Any) -> Read:
        """act(*arguments) on what is in a body of `size` bytes, in a thread; of long ones one at a time."""
        async with self.reading if size > LONG_BODY else nullcontext():
            return await asyncio.to_thread(act, *arguments)

    def encoded(self, text: str) -> list[int]:
        """The tokens of a text. Raises Refused for a text that is too long for a prompt."""
        self.bounds.judge_length(text)
        return self.catalog.tokenizer.encode(text)

    def _request(
        self,
        form: TextAsked | ChatAsked,
        voice: Voice,
        asking: Asking,
        place: int,
        exchange: Exchange,
        schema: Compiled | None,
    ) -> Request:
        """The engine's request for all answers to one of the prompts."""
        prompt, tokenizer = asking.prompts[place], self.catalog.tokenizer
        think = (form.think or "") if isinstance(form, ChatAsked) else None
        echo = isinstance(form, TextAsked) and bool(form.echo)
        scores: list[Odds] = []
        answers = []
        for number in range(place * asking.times, (place + 1) * asking.times):
            text = Continuation({}, tokenizer, asking.stops)
            opening = self._opening(prompt, number, scores) if echo else None
            if think == "on":
                opening = partial(Piece, number, OPENINGS["on"].lstrip(), ())
            choice = Choice(exchange, number, text, LEADS[think], opening)
            sampling = replace(asking.sampling, seed=asking.sampling.seed + number)
            held = None if schema is None else schema.held()
            answers.append(Answer(sampling, asking.max_tokens, choice, asking.odds, held))
        scored = scores.append if echo and asking.odds is not None else None
        return Request(voice, prompt.tokens, answers, prompt.marks, 0, scored, asking.odds or 0)

    def _opening(self, prompt: Prompt, number: int, scores: list[Odds]) -> Callable[[], Piece]:
        """The prompt as the first piece of an answer that repeats it, with its scores, if there are any by then."""

        def opening() -> Piece:
            odds = (None, *scores) if scores or len(prompt.tokens) == 1 else (None,) * len(prompt.tokens)
            text = self.catalog.tokenizer.decode(prompt.tokens)
            return Piece(number, text, tuple(map(Drawn, prompt.tokens, odds)))

        return opening

    def _finished(self) -> None:
        self.answers -= 1


class Conversation:
    """The answers to one request as HTTP tells them."""

    def __init__(
        self, exchange: Exchange, requests: list[Request], teller: Teller, metrics: Metrics, tells_usage: bool
    ) -> None:
        self.exchange, self.requests, self.teller, self.metrics = exchange, requests, teller, metrics
        self.tells_usage = tells_usage

    async def whole(self, left: Awaitable[object]) -> dict[str, Any]:
        """The body of a whole answer; `left` is done if the client goes away before. Raises Refused for answers that
        could not be drawn."""
        reading = asyncio.ensure_future(self._gathered())
        leaving = asyncio.ensure_future(left)
        try:
            await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise Refused(499, "the client went away")
            answers = [joined(pieces) for _, pieces in sorted(reading.result().items())]
            return self.teller.whole(answers, self.usage())
        finally:
            self.exchange.gone.set()
            for task in (reading, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Refused):
                    await task

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of an answer that is told as it is drawn."""
        begun: set[int] = set()
        try:
            async for piece in self._pieces():
                if (part := self.teller.part(piece, piece.number not in begun)) is not None:
                    yield self.teller.chunk([part])
                    begun.add(piece.number)
            if self.tells_usage:
                yield self.teller.chunk([], self.usage())
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield event(refused.body)

    def usage(self) -> Usage:
        prompts = sum(len(request.tokens) for request in self.requests)
        return Usage(prompts, sum(request.known for request in self.requests), self.exchange.drawn)

    async def _gathered(self) -> dict[int, list[Piece]]:
        found: dict[int, list[Piece]] = {}
        async for piece in self._pieces():
            found.setdefault(piece.number, []).append(piece)
        return found

    async def _pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all answers. Raises Refused for one that could not be drawn."""
        waits = True
        async for piece in self.exchange.heard():
            if piece.end in BROKEN:
                raise Refused(500, BROKEN[piece.end])
            if piece.end == LATE and waits:
                raise Refused(503, "the time was over before the answer began; try again later")
            if piece.tokens and waits:
                waits = False
                self.metrics.began(time.monotonic() - self.exchange.began)
            yield piece
