"""Admission of requests, the thread of the engine that answers them, and figures of both."""

import argparse
import asyncio
import os
import queue
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import torch

from ...cli.errors import UserError, is_gpu_memory
from ...data.feedback import FeedbackFile
from ..engine import Engine, PrefillBudget
from ..requests import Completion, Constraint, GenerationRequest, PrefixCache
from ..settings import Sampling
from ..speakers import Speaker
from ..text import Continuation
from ..thinking import constraint_behind
from .catalog import Catalog
from .conversation import FAILED, CompletionStream, Conversation, StateListener
from .feedback import AnswerLog
from .requests import ChatBody, CompletionBody, Limits, Prompt, prompts_within
from .responses import ChatResponse, CompletionResponse, Response
from .schema import SchemaCompiler, SchemaConstraint
from .states import CacheFile
from .web import RequestError

Read = TypeVar("Read")

LONG_BODY = 1 << 16  # bytes: longer bodies are tokenized one at a time, because tokenizers hold Python's lock
PIECE, STEP_SECONDS = 64, 0.1  # prompt tokens that are read at first between two tokens, and the time for it later
TOGETHER = 0.005  # seconds between requests that begin together


class EngineThread(threading.Thread):
    """Steps an Engine as long as it is busy. After an error, running completions end and waiting ones go on; after a
    CUDA error, no kernel of this process runs any more: all end, it becomes `failure`, and end() is called."""

    def __init__(self, engine: Engine, end: Callable[[], object]) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self.end = engine, end
        self.failure: BaseException | None = None
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

    def call(self, function: Callable[[], object]) -> None:
        """Run function() in the thread, between two steps."""
        self._calls.put(function)

    def stop(self) -> None:
        self._calls.put(None)
        self.join()

    def run(self) -> None:
        while True:
            calls = [] if self.engine.busy else self._first_calls()
            while not self._calls.empty():
                calls.append(self._calls.get())
            for call in calls:
                if call is None:
                    return
                call()
            try:
                self.engine.step()
            except BaseException as error:  # a panic of a package in Rust is no Exception
                traceback.print_exc()
                lost = is_cuda_error(error)
                if lost:
                    self.engine.waiting.clear()
                self.engine.fail(FAILED)
                if lost and self.failure is None:
                    self.failure = error
                    self.end()

    def _first_calls(self) -> list[Callable[[], object] | None]:
        """Wait for a call -> it and those that follow one another at once, so that one pass reads all their prompts."""
        calls, end = [self._calls.get()], time.monotonic() + STEP_SECONDS
        with suppress(queue.Empty):
            while calls[-1] is not None and time.monotonic() < end:
                calls.append(self._calls.get(timeout=TOGETHER))
        return calls


def is_cuda_error(error: BaseException) -> bool:
    """True for an error after which each later call of CUDA in this process fails too; out of memory is none."""
    if is_gpu_memory(error):
        return False
    accelerator = getattr(torch, "AcceleratorError", ())  # of newer versions of torch
    return isinstance(error, accelerator) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


class Metrics:
    """Figures of the server for Prometheus."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.first_tokens = 0
        self.first_seconds = self.longest = 0.0

    def count_status(self, status: int) -> None:
        self.statuses[status] += 1

    def count_first_token(self, seconds: float) -> None:
        """Count a request with its first token after so many seconds."""
        self.first_tokens += 1
        self.first_seconds += seconds
        self.longest = max(self.longest, seconds)

    def text(self, engine: Engine, open_completions: int) -> str:
        """All figures in Prometheus's text form."""
        running = engine.places_taken
        figures = (
            ("tokens_drawn_total", "counter", engine.sampled),
            ("prompt_tokens_read_total", "counter", engine.read),
            ("prompt_tokens_known_total", "counter", engine.reused),
            ("answers_drawn_now", "gauge", running),
            ("answers_waiting", "gauge", max(open_completions - running, 0)),
            ("known_state_bytes", "gauge", engine.cache.size),
            ("first_token_seconds_count", "counter", self.first_tokens),
            ("first_token_seconds_sum", "counter", self.first_seconds),
            ("first_token_seconds_longest", "gauge", self.longest),
        )
        lines = [f"# TYPE rwkv_peft_{name} {kind}\nrwkv_peft_{name} {value}" for name, kind, value in figures]
        lines.append("# TYPE rwkv_peft_requests_total counter")
        lines += [f'rwkv_peft_requests_total{{status="{key}"}} {value}' for key, value in sorted(self.statuses.items())]
        return "\n".join(lines) + "\n"


class Service:
    """The routes' shared state. open: completions that wait or run; places: the most of them."""

    def __init__(self, args: argparse.Namespace, defaults: Sampling, catalog: Catalog) -> None:
        self.catalog, self.defaults, self.seconds = catalog, defaults, args.max_seconds
        vocabulary = min(catalog.tokenizer.vocab_size, catalog.base_speaker.model.config.vocab_size)
        self.limits = Limits(args.batch, args.max_prompt, args.max_tokens, vocabulary, catalog.chat)
        self.places, self.open = args.batch + args.queue, 0
        self.metrics = Metrics()
        self.feedback: AnswerLog | None = None
        if args.feedback:
            self.feedback = AnswerLog(FeedbackFile(args.feedback, catalog.tokenizer, args.max_tokens), catalog)
        self.schemas = SchemaCompiler(catalog.tokenizer, vocabulary, catalog.chat.tool_form)
        # so that few of the pool's threads wait
        self.compiling, self.reading, self.mixing = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        cache, overlap = PrefixCache(args.known_mib << 20), catalog.base_speaker.model.emb.weight.is_cuda
        self.file = CacheFile(args.cache_folder, cache, catalog.base_speaker) if args.cache_folder else None
        if self.file is not None:
            self.file.read()
        self.engine = Engine(vocabulary, args.batch, cache, PrefillBudget(PIECE, STEP_SECONDS), overlap)
        self.thread = EngineThread(self.engine, partial(os.kill, os.getpid(), signal.SIGTERM))
        catalog.forget = lambda model: self.thread.call(partial(self.engine.forget, model))

    async def converse(
        self, body: CompletionBody | ChatBody, size: int, form: type[ChatResponse] | None = None
    ) -> Conversation:
        """Admit a request with a body of `size` bytes, and start it; form is that of another protocol's answers. Raises
        RequestError."""
        schema = None
        if isinstance(body, ChatBody) and (body.response_format or body.must_call):
            async with self.compiling:
                schema = await asyncio.to_thread(self.schemas.compiled, body)
        speaker = await self._speaker(body)
        if body.save_state is not None:
            self._check_saving(body, body.save_state)
        prompts = await self.read(size, prompts_within, body, self.catalog.tokenizer, self.limits)
        sampling = body.sampling(self.defaults)
        count = len(prompts) * body.times
        if self.open + count > self.places:
            raise RequestError(429, "all places are taken; try again later", code="rate_limit_exceeded")
        if schema is not None and isinstance(body, ChatBody) and body.prefilled:
            message = "messages: the last one begins an answer that is held to a form; leave it out"
            raise RequestError(400, message, "messages")
        head = speaker.name, self.catalog.tokenizer, body.top_logprobs_due is not None
        response: Response
        if isinstance(body, ChatBody):
            response = (form or ChatResponse)(*head, body.calls, body.must_call, body.splits)
        else:
            response = (form or CompletionResponse)(*head)
        response.includes_usage = body.includes_usage
        if (longest := body.longest(self.limits)) != body.max_tokens_asked:
            response.notes["max_tokens"] = longest
        if body.ignored:
            response.notes["ignored"] = body.ignored
        conversation = Conversation(response, count, self.seconds, self.metrics.count_first_token, self._ended)
        try:
            conversation.requests = [
                self._request(body, speaker, prompt, place * body.times, sampling, schema, conversation)
                for place, prompt in enumerate(prompts)
            ]
        except UserError as error:
            raise RequestError(400, str(error), "stop") from error
        if body.save_state is not None:
            conversation.save = partial(self._save, body.save_state, conversation.requests[0], body.turn_end)
        if self.feedback is not None and isinstance(body, ChatBody):
            self.feedback.follow(body, size, conversation)
        self.open += count
        for request in conversation.requests:
            if longest:
                self.thread.call(partial(self.engine.add, request))
            else:
                for completion in request.completions:
                    completion.listener.on_end("length")
        return conversation

    def stop(self) -> None:
        """Stop the engine, and write its cache to the file if there is one."""
        self.thread.stop()
        if self.file is not None and self.thread.failure is None:
            self.file.write()

    async def _speaker(self, body: CompletionBody | ChatBody) -> Speaker:
        """The speaker of a request. One from a state, or with adapters at scales, is made in a thread. Raises
        RequestError."""
        if body.adapter_scale is None and body.adapters is None and body.state is None:
            return self.catalog.speaker(body.model, None)
        async with self.mixing:
            return await asyncio.to_thread(
                self.catalog.speaker, body.model, body.state, body.adapter_scale, body.adapters
            )

    def _check_saving(self, body: CompletionBody | ChatBody, name: str) -> None:
        """Raise RequestError if the state after a request's answer cannot be saved under a name."""
        self.catalog.states.path(self.catalog.free(name), new=True)
        if body.prompt_count() * body.times > 1:
            raise RequestError(400, "save_state: it is the state after one answer; ask for one", "save_state")
        if not self.engine.cache.limit:
            raise RequestError(400, "save_state: --known_mib 0 caches no state; start with more", "save_state")

    async def _save(self, name: str, request: GenerationRequest, end: str) -> None:
        """Save the state after a request's answer, as the client got it, and the text `end`, by another request, which
        finds most of these tokens in the cache. Raises RequestError."""
        listener = request.completions[0].listener
        assert isinstance(listener, CompletionStream)
        tokens = request.tokens + listener.text.shown_tokens() + self.catalog.tokenizer.encode(end)
        found = asyncio.get_running_loop().create_future()
        waiting = StateListener(lambda: self.engine.cache.longest(request.speaker, tokens), found)
        greedy = Completion(Sampling(temperature=0), 1, waiting)
        self.thread.call(partial(self.engine.add, GenerationRequest(request.speaker, tokens, [greedy])))
        prefix = await found
        if prefix is None or prefix.length < len(tokens):
            raise RequestError(500, "save_state: the state was not cached; a larger --known_mib keeps it", "save_state")
        await asyncio.to_thread(self.catalog.states.save, name, prefix.state)

    async def read(self, size: int, function: Callable[..., Read], *arguments: Any) -> Read:
        """function(*arguments) on the content of a body of `size` bytes, in a thread; long bodies one at a time."""
        async with self.reading if size > LONG_BODY else nullcontext():
            return await asyncio.to_thread(function, *arguments)

    def encoded(self, text: str) -> list[int]:
        """The tokens of a text. Raises RequestError for a text that is too long for a prompt."""
        self.limits.check_length(text)
        return self.catalog.tokenizer.encode(text)

    def _request(
        self,
        body: CompletionBody | ChatBody,
        speaker: Speaker,
        prompt: Prompt,
        first: int,
        sampling: Sampling,
        schema: SchemaConstraint | None,
        conversation: Conversation,
    ) -> GenerationRequest:
        """The engine's request for a prompt, with completions numbered from `first` on; number i has the seed of
        `sampling` plus i."""
        tokenizer, opening, completions = self.catalog.tokenizer, body.opening, []
        if isinstance(body, CompletionBody) and body.echo:
            opening = tokenizer.decode(prompt.tokens)
        for number in range(first, first + body.times):
            text = Continuation({}, tokenizer, body.stops)
            listener = CompletionStream(conversation, number, text, body.lead, opening)
            constraint: Constraint | None = None
            if schema is not None:
                constraint = schema.copy()
            elif isinstance(body, ChatBody):
                constraint = constraint_behind(body.opening, tokenizer, self.limits.vocabulary)
            longest = body.longest(self.limits)
            completions.append(Completion(sampling.seeded(number), longest, listener, constraint))
        return GenerationRequest(speaker, prompt.tokens, completions, prompt.marks)

    def _ended(self) -> None:
        self.open -= 1
