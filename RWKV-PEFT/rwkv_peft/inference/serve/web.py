"""What `serve` and `ui` share: an application that answers every mistake in one form, and the process that listens."""

import asyncio
import json
import resource
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from ... import __version__
from ...cli.errors import Ended, UserError, short
from ...cli.streams import encoded
from .gate import App, Refused

CONNECTIONS = 512  # the most at a time, if the process may open twice as many files
BACKLOG = 64  # connections that are taken at once, before the first of them is looked at


class Body(JSONResponse):
    """JSON, of texts that are not Unicode too, such as a file's name or what a model wrote as "\\ud800"."""

    def render(self, content: Any) -> bytes:
        return encoded(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def new_app(title: str, lifespan: Any = None) -> FastAPI:
    """An application without routes that answers every mistake in OpenAI's form."""
    none = dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
    app = FastAPI(title=title, version=__version__, lifespan=lifespan, default_response_class=Body, **none)
    for kind in (Refused, UserError, RequestValidationError, HTTPException, RecursionError, Exception):
        app.add_exception_handler(kind, tell_refusal)
    return app


async def tell_refusal(http: Request, error: Exception) -> Response:
    refused = refused_by(error)
    return Body(refused.body, refused.status, dict(refused.headers))


def refused_by(error: Exception) -> Refused:
    """The refusal that an exception of a route means."""
    match error:
        case Refused():
            return error
        case RequestValidationError():
            # of several mistakes that of the innermost field, because one of other forms is told too
            mistake = max(error.errors(), key=lambda mistake: len(mistake["loc"]))
            field = place_of(mistake["loc"])
            words = "there is no such field here" if mistake["type"] == "extra_forbidden" else short(mistake["msg"])
            return Refused(400, f"{field or 'body'}: {words}", field or None)
        case HTTPException():
            return Refused(error.status_code, short(str(error.detail)))
        case UserError() | OSError():  # the latter of a full disk, or of a folder that is gone
            return Refused(400, str(error))
        case RecursionError():
            return Refused(400, "the body has lists and objects that nest too deep")
    return Refused(500, "the server failed; see what it has printed")


def place_of(location: Sequence[str | int]) -> str:
    """A field's place in the body: "messages.0"."""
    return short(".".join(str(part) for part in location if part not in ("body", "query")))


class Protocol(H11Protocol):
    """A connection that ends if the head of a request does not come in time. If there are too many, the one that has
    waited longest for a whole request ends: a client that sends its requests at once waits for nobody who does not."""

    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2):
            waiting = [one for one in self.connections if isinstance(one, Protocol) and one.waits]
            min(waiting, key=lambda one: one.since).transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    @property
    def waits(self) -> bool:
        """Tell whether a whole request has yet to come."""
        idle = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        return idle and not self.transport.is_closing()

    def _await_head(self) -> None:
        """Look after the time of a keep-alive whether a request has begun since."""
        self.since, cycle = self.loop.time(), self.cycle

        def look() -> None:
            if self.cycle is cycle and (cycle is None or cycle.response_complete):
                self.transport.abort()

        self.loop.call_later(self.timeout_keep_alive, look)


class Server(uvicorn.Server):
    """Calls `begin` when it listens, and `leave` in a thread when a signal ends it, before it waits for answers that
    still go on."""

    def __init__(self, config: uvicorn.Config, begin: Callable[[], None], leave: Callable[[], None]) -> None:
        super().__init__(config)
        self.begin, self.leave = begin, leave

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.begin()

    def handle_exit(self, sig: int, frame: Any) -> None:
        threading.Thread(target=self.leave).start()
        super().handle_exit(sig, frame)


def run(
    app: App,
    listener: socket.socket,
    patience: float,
    drain: int,
    begin: Callable[[], None],
    leave: Callable[[], None] = lambda: None,
) -> None:
    """Serve an application at a bound socket until Ctrl-C or SIGTERM: clients are waited for `patience` seconds, and at
    the end answers for `drain`; begin and leave as of Server."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=max(1, round(patience)),
        timeout_graceful_shutdown=drain,
    )
    try:
        Server(config, begin, leave).run(sockets=[listener])
    except (KeyboardInterrupt, Ended):  # uvicorn has drained by then, and sends itself the signal once more
        print("stopped", file=sys.stderr)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises UserError if it is none, or taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"--port {port} at {host}: {error.strerror}; choose another, as --port 0 for any free one"
        ) from error
    return listener
