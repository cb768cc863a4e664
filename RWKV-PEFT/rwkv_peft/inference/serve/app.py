"""Serve a model over HTTP: `rwkv-peft serve --help`."""

import argparse
import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ... import __version__
from ...cli.errors import UserError, summarize
from ...data.feedback import check_feedback_file
from ..chat import remark
from . import anthropic, ollama, openai_responses
from .catalog import Catalog
from .conversation import Conversation
from .flags import parse_flags
from .requests import ChatBody, CompletionBody, DetokenizeBody, FeedbackBody, LoadBody, TokenizeBody
from .responses import ChatResponse
from .service import Service
from .web import App, Body, Gate, Guard, RequestError, bound, new_app, run

OLLAMA_PORT = 11434
END = "<|endoftext|>"  # the name of the token that ends a document, which has no text


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C -> the exit code, 1 after a CUDA error. Raises UserError for mistakes in flags and
    files."""
    args, defaults = parse_flags(argv)
    if args.feedback:
        files = [("--adapter", given.path) for given in args.adapter]
        files += [("--state", given.path) for given in args.state]
        check_feedback_file(args.feedback, [("--model", args.model), *files])
    with listening(args) as listener:
        catalog = Catalog(args)
        service = Service(args, defaults, catalog)
        app = make_app(service, args)
        host, port = listener.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        line = f"{', '.join(catalog.speakers)}: http://{where}/v1"
        run(app, listener, args.client_seconds, args.drain_seconds, lambda: print(line, flush=True))
    if (failure := service.thread.failure) is not None:
        words = (
            f"the GPU failed, and this process cannot use it any more ({summarize(failure)}); start the server again"
        )
        print(f"error: {words}", file=sys.stderr)
        return 1
    return 0


def listening(args: argparse.Namespace) -> socket.socket:
    """The socket of the flags: with --ollama at Ollama's port, unless that is taken. Raises UserError as `bound`
    does."""
    if args.ollama:
        try:
            return bound(args.host, OLLAMA_PORT)
        except UserError:
            remark(f"note: port {OLLAMA_PORT} is taken, perhaps by Ollama itself; give clients the address below")
    return bound(args.host, args.port)


def make_app(service: Service, args: argparse.Namespace) -> App:
    """The application, behind its guard."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        yield
        await asyncio.to_thread(service.stop)

    errors = {"/api/": ollama.error_fields, anthropic.PATH: anthropic.error_fields}
    app = new_app("rwkv-peft serve", lifespan, errors)
    routes = APIRouter()
    add_routes(routes, service)
    add_state_routes(routes, service)
    add_token_routes(routes, service)
    app.include_router(routes, prefix="/v1")
    app.include_router(routes, include_in_schema=False)  # for clients that are given the address without /v1
    add_ollama_routes(app, service)
    add_other_routes(app, service)
    if args.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=args.allow_origin,
            allow_methods=["*"],
            allow_headers=["authorization", "content-type", *anthropic.HEADERS],
        )
    gate = Gate((*args.allow_host, args.host), args.allow_origin, args.key, args.body_mib << 20, args.client_seconds)
    gate = replace(gate, raw=dict.fromkeys(("/v1/states/", "/states/"), service.catalog.states.most), errors=errors)
    return Guard(app, gate, service.metrics.count_status)


def add_routes(app: APIRouter, service: Service) -> None:
    catalog, loading = service.catalog, asyncio.Lock()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(service.engine, service.open))

    @app.get("/props")
    async def props() -> dict[str, Any]:
        """The properties that llama.cpp's web client reads first."""
        generation = {"n_ctx": service.limits.prompt, "params": asdict(service.defaults)}
        media = {"vision": False, "audio": False}
        name = catalog.base_speaker.name
        return {"default_generation_settings": generation, "model_path": name, "modalities": media}

    @app.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [catalog.listing(name) for name in [*catalog.speakers]]}

    @app.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return catalog.listing(name)

    @app.post("/adapters")
    async def load(body: LoadBody) -> dict[str, Any]:
        async with loading:
            await asyncio.to_thread(catalog.load, body.name, body.file, body.kind)
        return catalog.listing(body.name)

    @app.delete("/adapters/{name}")
    async def drop(name: str) -> dict[str, Any]:
        async with service.mixing:
            catalog.drop(name)
        return {"id": name, "object": "model", "deleted": True}

    @app.post("/completions")
    async def complete(body: CompletionBody, http: Request) -> Response:
        return await answer(service, body, http)

    @app.post("/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        return await answer(service, body, http)

    @app.post("/feedback")
    async def feedback(body: FeedbackBody) -> dict[str, Any]:
        if service.feedback is None:
            raise RequestError(403, "no feedback is taken; start the server with --feedback FILE.jsonl")
        await asyncio.to_thread(service.feedback.take, body)
        return {"id": body.id, "object": "feedback", "index": body.index}


def add_state_routes(app: APIRouter, service: Service) -> None:
    """Routes for states by name."""
    states = service.catalog.states

    @app.get("/states")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [states.listing(name) for name in states.names()]}

    @app.get("/states/{name}")
    async def download(name: str) -> Response:
        return FileResponse(states.path(name), media_type="application/octet-stream", filename=f"{name}.pth")

    @app.put("/states/{name}")
    async def upload(name: str, http: Request) -> dict[str, Any]:
        content = await http.body()
        async with service.mixing:
            await asyncio.to_thread(states.upload, service.catalog.free(name), content)
        return states.listing(name)

    @app.delete("/states/{name}")
    async def delete(name: str) -> dict[str, Any]:
        async with service.mixing:
            states.delete(name)
        return {"id": name, "object": "state", "deleted": True}


def add_token_routes(app: APIRouter, service: Service) -> None:
    """Routes for clients that score texts, such as the lm-evaluation-harness, and tokenize as the model does."""
    tokenizer = service.catalog.tokenizer

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return {"name": tokenizer.name, "eos_token": None if tokenizer.end_id is None else END}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        ends = body.prompt == END and tokenizer.end_id is not None
        tokens = [tokenizer.end_id] if ends else await service.read(len(body.prompt), service.encoded, body.prompt)
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        return {"prompt": await service.read(len(body.tokens), tokenizer.decode, body.tokens)}


def add_ollama_routes(app: FastAPI, service: Service) -> None:
    """Routes of Ollama's interface."""
    catalog, routes = service.catalog, APIRouter(prefix="/api")

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @routes.get("/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [ollama.listing(catalog, name) for name in [*catalog.speakers]]}

    @routes.get("/ps")
    async def running() -> dict[str, Any]:
        return {"models": [ollama.running(catalog, name) for name in [*catalog.speakers]]}

    @routes.post("/show")
    async def show(body: dict[str, Any]) -> dict[str, Any]:
        return ollama.shown(catalog, body)

    @routes.post("/chat")
    async def chat(body: dict[str, Any], http: Request) -> Response:
        if body.get("messages") in (None, []):
            return Body(ollama.loaded(catalog, body) | {"message": {"role": "assistant", "content": ""}})
        return await answer(service, ChatBody.of(ollama.chat_of(body)), http, ollama.OllamaResponse)

    @routes.post("/generate")
    async def generate(body: dict[str, Any], http: Request) -> Response:
        if not body.get("prompt"):
            return Body(ollama.loaded(catalog, body) | {"response": ""})
        kind, fields = ollama.text_of(body)
        return await answer(service, kind.of(fields), http, ollama.OllamaText)

    app.include_router(routes)


def add_other_routes(app: FastAPI, service: Service) -> None:
    """Anthropic's route, and OpenAI's newer one."""

    @app.post(anthropic.PATH)
    async def messages(body: dict[str, Any], http: Request) -> Response:
        return await answer(service, ChatBody.of(anthropic.chat_of(body)), http, anthropic.MessageResponse)

    @app.post(openai_responses.PATH)
    async def responses(body: dict[str, Any], http: Request) -> Response:
        return await answer(service, ChatBody.of(openai_responses.chat_of(body)), http, openai_responses.ItemResponse)


async def answer(
    service: Service, body: CompletionBody | ChatBody, http: Request, form: type[ChatResponse] | None = None
) -> Response:
    """Answer a request, in OpenAI's form or another protocol's. Raises RequestError."""
    conversation = await service.converse(body, len(await http.body()), form)
    if body.stream:
        return Events(conversation)
    return Body(await conversation.whole(departure(http)))


class Events(StreamingResponse):
    """A streamed response, which cancels its completions if the client leaves."""

    def __init__(self, conversation: Conversation) -> None:
        super().__init__(conversation.stream(), media_type=conversation.response.media)
        self.conversation = conversation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.conversation.gone.set()


async def departure(http: Request) -> None:
    """Return when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
