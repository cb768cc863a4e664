"""Judge requests before anything reads them: who may ask, how large a body may be, how slow a client.

A browser lets any page send requests to this machine. Such a page is told by the Origin that the browser names, and a
name that a stranger's DNS server turned into this machine's address by the Host. An address in digits is no such name.
"""

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from ...cli.streams import encoded

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
JSON = "application/json"
PASSED = 4  # a body of so many times the most is read, and dropped: who is still sending would not hear the refusal
SPARSE = 64  # bytes of the largest body for each list, object and field: two million empty lists take seconds to read
RETRY = 5  # seconds after which a client that finds no place may try again
SAID = 2000  # characters of a message, which may quote a name of any length
KINDS = MappingProxyType(
    {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
)
HEADERS = (  # of every answer
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Refused(Exception):
    """A request that is not answered: HTTP's status, what is wrong and the remedy, the field, and OpenAI's code. A long
    message keeps its beginning and its end."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        if len(message) > SAID:
            message = f"{message[: SAID // 2]} … {message[-SAID // 2 :]}"
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = encoded(message).decode(), param and encoded(param).decode()

    @property
    def body(self) -> dict[str, Any]:
        """The refusal in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": str(RETRY)} if self.status in (429, 503) else {}


@dataclass(frozen=True)
class Gate:
    """Who may ask: hosts are the names of this server besides localhost, origins the sites whose pages may call it, key
    what clients must give (None: nothing) but at the paths `open`, as Authorization: Bearer or as the value of a
    cookie, if it has a name. A body has at most `most` bytes, and is JSON; at the paths of `raw` it is any bytes, of
    the most that stands beside them. A client is waited for `patience` seconds."""

    hosts: Sequence[str]
    origins: Sequence[str]
    key: str | None
    most: int
    patience: float
    open: Sequence[str] = ("/health",)  # who watches over a process has no key
    cookie: str = ""
    raw: Sequence[tuple[str, int]] = ()

    def judge(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raise Refused for a request that may not be answered."""
        host = headers.get("host", "")
        if not self.knows(host):
            raise Refused(421, f"this server is not called {host[:200]!r}; `serve --allow_host NAME` allows a name")
        origin = headers.get("origin")
        foreign = origin is not None and origin not in self.origins and urlsplit(origin).netloc != host
        part = headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-dest") != "document"
        if foreign or (origin is None and part):  # part of a page; a link from one is followed by a person
            raise Refused(403, "pages of other sites may not call this server; `serve --allow_origin` allows a site")
        if path not in self.open and method != "OPTIONS" and not self.has_key(headers):
            remedy = "open the address that was printed" if self.cookie else "send Authorization: Bearer KEY"
            raise Refused(401, f"the key is missing or wrong; {remedy}", code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != JSON and path not in dict(self.raw):
            raise Refused(415, f"a body is due as {JSON}")
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > PASSED * self.most_at(path):
            raise self.too_large(path)

    def has_key(self, headers: Mapping[str, str]) -> bool:
        """Tell whether a request has the key, if one is due."""
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.cookie:
            cookies = dict(one.strip().partition("=")[::2] for one in headers.get("cookie", "").split(";"))
            given = cookies.get(self.cookie, given)
        return self.key is None or self.is_key(given)

    def is_key(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), str(self.key).encode())

    def knows(self, host: str) -> bool:
        """True if the header Host names this server: localhost, an address in digits, or one of `hosts`."""
        name = (urlsplit(f"//{host}").hostname or "") if not set("@/?#") & set(host) else ""
        if name in ("localhost", *(own.lower() for own in self.hosts)):
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def most_at(self, path: str) -> int:
        return dict(self.raw).get(path, self.most)

    def too_large(self, path: str) -> Refused:
        return Refused(413, f"the body is larger than the {self.most_at(path):,} bytes that are taken; send less")


class Guard:
    """An ASGI application around another: it refuses what its gate does, hands on whole bodies, and gives up clients
    that do not read what they asked for. tell(status) hears of each answer's status."""

    def __init__(self, app: App, gate: Gate, tell: Callable[[int], object] = lambda status: None) -> None:
        self.app, self.gate, self.tell = app, gate, tell

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        begun = given_up = False

        async def patient(message: Message) -> None:
            nonlocal begun, given_up
            if message["type"] == "http.response.start":
                begun = True
                self.tell(message["status"])
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            try:
                await asyncio.wait_for(send(message), self.gate.patience)
            except asyncio.TimeoutError:
                given_up = True
                raise

        path = scope["path"]
        try:
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            self.gate.judge(scope["method"], path, headers)
            body = await asyncio.wait_for(self.whole(path, receive), self.gate.patience)
        except ValueError:  # of an Origin or a Host that is no address at all
            return await refuse(patient, Refused(400, "the header Host or Origin is malformed"))
        except asyncio.TimeoutError:
            return await refuse(patient, Refused(408, "the body did not come in time; send it faster, or send less"))
        except Refused as refused:
            return await refuse(patient, refused)
        if body is None:
            return None
        # UTF-16, which hides its quotes, has zeros
        if path not in dict(self.gate.raw) and (b"\0" in body or structure(body) > self.gate.most // SPARSE):
            return await refuse(patient, Refused(413, "the body is not UTF-8, or has too many lists and objects"))
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return parts.pop() if parts else await receive()

        try:
            return await self.app(scope, replayed, patient)
        except asyncio.CancelledError:  # by the server, which ends and has waited for this answer
            if not begun:
                await refuse(patient, Refused(503, "the server ends; try again later"))
        except Exception:
            if not given_up:
                raise

    async def whole(self, path: str, receive: Receive) -> bytes | None:
        """Read the body, None if the client left. Raises Refused if it is too large."""
        body, size, most = bytearray(), 0, self.gate.most_at(path)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= most:
                body += part
            if size > most and not (message.get("more_body") and size <= PASSED * most):
                raise self.gate.too_large(path)
            if not message.get("more_body"):
                return bytes(body)


def structure(body: bytes) -> int:
    """The number of lists, objects and fields in a body of JSON; what looks like them in texts does not count."""
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    return sum(map(outside.count, (b"[", b"{", b":")))


async def refuse(send: Send, refused: Refused) -> None:
    """Answer with a refusal, after which the connection ends, because an unread body may follow on it."""
    body = json.dumps(refused.body).encode()
    headers = {**refused.headers, "content-type": JSON, "content-length": str(len(body)), "connection": "close"}
    told = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": told})
    await send({"type": "http.response.body", "body": body})
