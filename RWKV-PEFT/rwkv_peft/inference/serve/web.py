"""The web server under `serve` and `ui`: who may send requests, how large and how slow they may be, one form of errors,
and the process that listens.

A browser lets any page send requests to this machine. Such a page shows in the header Origin, and a name that a
stranger's DNS server turned into this machine's address in the header Host. An address in digits is no such name.
"""

import asyncio
import hmac
import ipaddress
import json
import re
import shlex
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from ... import __version__
from ...cli.errors import Ended, UserError, encoded, quoted, short
from ...system import most_files

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
JSON = "application/json"
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/?#\s]+))(?::\d+)?")  # an address or a name, and a port
READ_ANYWAY = 4  # times the largest body is read and dropped: a client that still sends would not see the refusal
SPARSE = 64  # bytes of the largest body for each list, object and field: two million empty lists take seconds to parse
RETRY = 5  # seconds until a client without a place may try again
LONGEST_MESSAGE = 2000  # characters; a message may quote a name of any length
CONNECTIONS = 512  # the most at a time, if the process may open twice as many files
BACKLOG = 64  # connections that are accepted at once, before the first of them is looked at
VALUELESS = ("missing", "value_error", "json_invalid")  # mistakes of no single value
KINDS = MappingProxyType(
    {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
)
HEADERS = (  # of every response
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class RequestError(Exception):
    """A request that is refused: HTTP's status, the mistake and its remedy, the field, and OpenAI's code. A long
    message is cut in its middle."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} … {message[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = encoded(message).decode(), param and encoded(param).decode()

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(RETRY)} if self.status in (429, 503) else {}


ErrorForms = Mapping[str, Callable[[RequestError], dict[str, Any]]]  # by the beginnings of paths


@dataclass(frozen=True)
class Gate:
    """Who may send requests, and how large and slow.

    hosts are this server's names besides localhost, origins the sites with pages that may call it. key, unless None, is
    required at all paths but those in `open`, as Authorization: Bearer or, if `cookie` names one, as its value. A body
    is JSON of at most `most` bytes; below the paths in `raw` it is any bytes, up to the path's number. A client
    may take `patience` seconds. Errors below the paths in `errors` have a form of their own.
    """

    hosts: Sequence[str]
    origins: Sequence[str]
    key: str | None
    most: int
    patience: float
    open: Sequence[str] = ("/health", "/v1/health")  # monitors of a process have no key
    cookie: str = ""
    raw: Mapping[str, int] = field(default_factory=dict)
    errors: ErrorForms = field(default_factory=dict)

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raise RequestError for a request that may not be answered."""
        host = headers.get("host", "")
        if not self.has_name(host):
            raise RequestError(
                421, f"this server is not called {host[:200]!r}; `serve --allow_host NAME` allows a name"
            )
        origin = headers.get("origin")
        foreign = origin is not None and origin not in self.origins and urlsplit(origin).netloc != host
        part = headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-dest") != "document"
        if foreign or (origin is None and part):  # a part of another page; a link there is followed by a person
            site = shlex.quote(encoded(short(origin or "ORIGIN")).decode())
            message = "pages of other sites and programs may not call this server"
            raise RequestError(403, f"{message}; `serve --allow_origin {site}` allows this one")
        if path not in self.open and method != "OPTIONS" and not self.has_key(headers):
            remedy = "open the address that was printed" if self.cookie else "send Authorization: Bearer KEY"
            raise RequestError(401, f"the key is missing or wrong; {remedy}", code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != JSON and not self.takes_raw(path):
            raise RequestError(415, f"a body is due as {JSON}")
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > READ_ANYWAY * self.most_at(path):
            raise self.too_large(path)

    def has_key(self, headers: Mapping[str, str]) -> bool:
        """True if a request has the key, or none is required."""
        given = headers.get("authorization", headers.get("x-api-key", "")).removeprefix("Bearer ")
        if self.cookie:
            cookies = dict(one.strip().partition("=")[::2] for one in headers.get("cookie", "").split(";"))
            given = cookies.get(self.cookie, given)
        return self.key is None or self.is_key(given)

    def is_key(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), str(self.key).encode())

    def has_name(self, host: str) -> bool:
        """True if the header Host names this server: localhost, an address in digits, or one of `hosts`."""
        found = HOST.fullmatch(host)
        name = (found[1] or found[2]).lower() if found else ""
        if name in ("localhost", *(own.lower() for own in self.hosts)):
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def most_at(self, path: str) -> int:
        return next((most for begin, most in self.raw.items() if path.startswith(begin)), self.most)

    def takes_raw(self, path: str) -> bool:
        return path.startswith((*self.raw,))

    def too_large(self, path: str) -> RequestError:
        return RequestError(413, f"the body is larger than the {self.most_at(path):,} bytes that are taken; send less")


class Guard:
    """An ASGI application behind a Gate: the application gets whole bodies, and clients that do not read their answers
    are dropped. log(status) gets the status of each response."""

    def __init__(self, app: App, gate: Gate, log: Callable[[int], object] = lambda status: None) -> None:
        self.app, self.gate, self.log = app, gate, log

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        begun = dropped = False

        async def patient(message: Message) -> None:
            nonlocal begun, dropped
            if message["type"] == "http.response.start":
                begun = True
                self.log(message["status"])
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            try:
                await asyncio.wait_for(send(message), self.gate.patience)
            except asyncio.TimeoutError:
                dropped = True
                raise

        path = scope["path"]
        refused = partial(refuse, patient, errors=self.gate.errors, path=path)
        try:
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            self.gate.check(scope["method"], path, headers)
            body = await asyncio.wait_for(self.whole_body(path, receive), self.gate.patience)
        except ValueError:  # of an Origin or a Host that is no address at all
            return await refused(RequestError(400, "the header Host or Origin is malformed"))
        except asyncio.TimeoutError:
            return await refused(RequestError(408, "the body did not come in time; send it faster, or send less"))
        except RequestError as error:
            return await refused(error)
        if body is None:
            return None
        # UTF-16, which hides its quotes, has zeros
        if not self.gate.takes_raw(path) and (b"\0" in body or structure(body) > self.gate.most // SPARSE):
            return await refused(RequestError(413, "the body is not UTF-8, or has too many lists and objects"))
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return parts.pop() if parts else await receive()

        try:
            return await self.app(scope, replayed, patient)
        except asyncio.CancelledError:  # by the server, which ends and has waited for this answer
            if not begun:
                await refused(RequestError(503, "the server ends; try again later"))
        except Exception:
            if not dropped:
                raise

    async def whole_body(self, path: str, receive: Receive) -> bytes | None:
        """The whole body, None if the client left. Raises RequestError if it is too large."""
        body, size, most = bytearray(), 0, self.gate.most_at(path)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= most:
                body += part
            if size > most and not (message.get("more_body") and size <= READ_ANYWAY * most):
                raise self.gate.too_large(path)
            if not message.get("more_body"):
                return bytes(body)


def structure(body: bytes) -> int:
    """The number of lists, objects and fields in a body of JSON, without those in its strings."""
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    return sum(map(outside.count, (b"[", b"{", b":")))


def error_fields(error: RequestError, path: str, errors: ErrorForms) -> dict[str, Any]:
    """An error in the form of a path's protocol, or else OpenAI's."""
    form = next((form for begin, form in errors.items() if path.startswith(begin)), None)
    return form(error) if form else error.body


async def refuse(send: Send, error: RequestError, path: str, errors: ErrorForms) -> None:
    """Send an error and close the connection, because an unread body may follow on it."""
    body = json.dumps(error_fields(error, path, errors)).encode()
    headers = {**error.headers, "content-type": JSON, "content-length": str(len(body)), "connection": "close"}
    pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class Body(JSONResponse):
    """JSON, also of texts that are not Unicode, such as a file's name or a generated "\\ud800"."""

    def render(self, content: Any) -> bytes:
        return encoded(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def new_app(title: str, lifespan: Any = None, errors: ErrorForms = MappingProxyType({})) -> FastAPI:
    """An application without routes that answers every exception in OpenAI's form, or in that of `errors` by path."""
    none = dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
    app = FastAPI(title=title, version=__version__, lifespan=lifespan, default_response_class=Body, **none)
    for kind in (RequestError, UserError, OSError, RequestValidationError, HTTPException, RecursionError, Exception):
        app.add_exception_handler(kind, partial(respond, errors=errors))
    return app


async def respond(http: Request, error: Exception, errors: ErrorForms) -> Response:
    found = request_error(error)
    if isinstance(error, HTTPException) and error.status_code == 404:
        routes = ", ".join(sorted(http.app.openapi()["paths"]))
        found = RequestError(404, f"there is no {short(http.url.path)} here; there are {routes}")
    return Body(error_fields(found, http.url.path, errors), found.status, found.headers)


def request_error(error: Exception) -> RequestError:
    """The RequestError for any exception of a route."""
    match error:
        case RequestError():
            return error
        case RequestValidationError():
            # of several mistakes that of the innermost field: for a union, pydantic lists those of each alternative
            mistake = max(error.errors(), key=lambda mistake: len(mistake["loc"]))
            field = short(".".join(fields_of(mistake["loc"], error.body)))
            words = short(mistake["msg"].removeprefix("Value error, "))
            words = "it is not supported; leave it out" if mistake["type"] == "extra_forbidden" else words
            value = "" if mistake["type"] in VALUELESS else f" {quoted(mistake['input'])}"
            return RequestError(400, f"{field or 'body'}{value}: {words}", field or None)
        case HTTPException():
            return RequestError(error.status_code, short(str(error.detail)))
        case UserError() | OSError():  # the latter of a full disk, or of a folder that is gone
            return RequestError(400, str(error))
        case RecursionError():
            return RequestError(400, "the body has lists and objects that nest too deep")
    return RequestError(500, "the server failed; see what it has printed")


def fields_of(place: Sequence[Any], body: Any) -> list[str]:
    """The fields and indices in pydantic's place of a mistake in a body, without its names of a union's types."""
    found, value = list[str](), body
    for part in place[1:]:
        if isinstance(value, dict) or (isinstance(value, list) and isinstance(part, int)):
            found.append(str(part))
            value = dict(enumerate(value) if isinstance(value, list) else value).get(part)
    return found


class Protocol(H11Protocol):
    """A connection that ends if the head of a request does not come in time. If there are too many connections, the one
    that has waited longest for a whole request ends, so that slow clients shut nobody out."""

    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > min(CONNECTIONS, most_files() // 2):
            waiting = [one for one in self.connections if isinstance(one, Protocol) and one.waits]
            min(waiting, key=lambda one: one.since).transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    @property
    def waits(self) -> bool:
        """True while a whole request has yet to come."""
        idle = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        return idle and not self.transport.is_closing()

    def _await_head(self) -> None:
        """Close the connection unless a request has begun after the time of a keep-alive."""
        self.since, cycle = self.loop.time(), self.cycle

        def check() -> None:
            if self.cycle is cycle and (cycle is None or cycle.response_complete):
                self.transport.abort()

        self.loop.call_later(self.timeout_keep_alive, check)


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
    """Serve an application at a bound socket until Ctrl-C or SIGTERM. A client may take `patience` seconds, and at the
    end answers have `drain` seconds; begin and leave are as in Server."""
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
