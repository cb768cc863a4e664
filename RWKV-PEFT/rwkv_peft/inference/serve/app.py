"""The routes of the server, as an ASGI application."""

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .forms import ChatAsked, Detokenized, Loaded, TextAsked, Tokenized
from .gate import App, Gate, Guard
from .service import Conversation, Service
from .web import Body, new_app

END = "<|endoftext|>"  # what the token that ends a document is called; it has no text


def make_app(service: Service, args: argparse.Namespace) -> App:
    """The application, behind its guard."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    app = new_app("rwkv-peft serve", lifespan)
    add_routes(app, service)
    add_token_routes(app, service)
    if args.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=args.allow_origin,
            allow_methods=["*"],
            allow_headers=["authorization", "content-type"],
        )
    gate = Gate((*args.allow_host, args.host), args.allow_origin, args.key, args.body_mib << 20, args.client_seconds)
    return Guard(app, gate, service.metrics.answered)


def add_routes(app: FastAPI, service: Service) -> None:
    catalog, loading = service.catalog, asyncio.Lock()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(service.worker.engine, service.answers))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [catalog.told(name) for name in [*catalog.voices]]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return catalog.told(name)

    @app.post("/v1/adapters")
    async def load(form: Loaded) -> dict[str, Any]:
        async with loading:
            await asyncio.to_thread(catalog.load, form.name, form.file, form.kind)
        return catalog.told(form.name)

    @app.delete("/v1/adapters/{name}")
    async def drop(name: str) -> dict[str, Any]:
        for voice in catalog.drop(name):
            service.worker.call(partial(service.worker.engine.forget, voice))
        return {"id": name, "object": "model", "deleted": True}

    @app.post("/v1/completions")
    async def complete(form: TextAsked, http: Request) -> Response:
        return await answer(service, form, http)

    @app.post("/v1/chat/completions")
    async def chat(form: ChatAsked, http: Request) -> Response:
        return await answer(service, form, http)


class Events(StreamingResponse):
    """An answer that is told as it is drawn, as long as the client listens."""

    def __init__(self, conversation: Conversation) -> None:
        super().__init__(conversation.stream(), media_type="text/event-stream")
        self.conversation = conversation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.conversation.exchange.gone.set()


def add_token_routes(app: FastAPI, service: Service) -> None:
    """Routes by which clients that score texts, such as the lm-evaluation-harness, tokenize as the model does."""
    tokenizer = service.catalog.tokenizer

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return {"name": tokenizer.name, "eos_token": None if tokenizer.end_id is None else END}

    @app.post("/tokenize")
    async def tokenize(form: Tokenized) -> dict[str, Any]:
        ends = form.prompt == END and tokenizer.end_id is not None
        tokens = [tokenizer.end_id] if ends else await service.read(len(form.prompt), service.encoded, form.prompt)
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize")
    async def detokenize(form: Detokenized) -> dict[str, Any]:
        return {"prompt": await service.read(len(form.tokens), tokenizer.decode, form.tokens)}


async def answer(service: Service, form: TextAsked | ChatAsked, http: Request) -> Response:
    conversation = await service.ask(form, len(await http.body()))
    if form.stream:
        return Events(conversation)
    return Body(await conversation.whole(departure(http)))


async def departure(http: Request) -> None:
    """Return when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
