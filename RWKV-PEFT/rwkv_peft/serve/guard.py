"""Judge requests before anything reads them: who may ask, how large a body may be, how slow a client.

A browser lets any page send requests to this machine. Such a page is told by the Origin that the browser names, and a
name that a stranger's DNS server turned into this machine's address by the Host. An address in digits is no such name.
"""

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .refused import Refused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
OPEN = ("/health",)  # needs no key: who watches over a process has none
JSON = "application/json"
PASSED = 4  # a body of so many times the most is read, and dropped: who is still sending would not hear the refusal
SPARSE = 64  # bytes of the largest body for each list, object and field: two million empty lists take seconds to read


@dataclass(frozen=True)
class Gate:
    """Who may ask: hosts are the names of this server besides localhost, origins the sites whose pages may call it, key
    what clients must give (None: nothing). A body has at most `most` bytes, and a client is waited for `patience`
    seconds."""

    hosts: Sequence[str]
    origins: Sequence[str]
    key: str | None
    most: int
    patience: float

    def judge(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raise Refused for a request that may not be answered."""
        host = headers.get("host", "")
        if not self.knows(host):
            raise Refused(421, f"this server is not called {host[:200]!r}; start it with --allow_host NAME")
        origin = headers.get("origin")
        foreign = origin is not None and origin not in self.origins and urlsplit(origin).netloc != host
        if foreign or (origin is None and headers.get("sec-fetch-site") == "cross-site"):
            raise Refused(403, "pages of other sites may not call this server; start it with --allow_origin ORIGIN")
        given = headers.get("authorization", "").removeprefix("Bearer ")
        needs_key = self.key and path not in OPEN and method != "OPTIONS"
        if needs_key and not hmac.compare_digest(given.encode("latin-1", "replace"), str(self.key).encode()):
            raise Refused(401, "the key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise Refused(415, f"a body is due as {JSON}")
        self.judge_size(headers)

    def judge_size(self, headers: dict[str, str]) -> None:
        """Raise Refused for a body that says that it is far too large."""
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > PASSED * self.most:
            raise self.too_large

    def is_json(self, path: str) -> bool:
        """Tell whether bodies to a path are read as JSON."""
        return True

    def knows(self, host: str) -> bool:
        """True if the header Host names this server: localhost, an address in digits, or one of `hosts`."""
        name = (urlsplit(f"//{host}").hostname or "") if not set("@/?#") & set(host) else ""
        if name in ("localhost", *(own.lower() for own in self.hosts)):
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    @property
    def too_large(self) -> Refused:
        return Refused(
            413, f"the body is larger than {self.most:,} bytes; send less, or start with a larger --body_mib"
        )


class Guard:
    """An ASGI application around another: it refuses what its gate does, hands on whole bodies, and gives up clients
    that do not read what they asked for. tell(status) hears of each answer's status."""

    def __init__(self, app: App, gate: Gate, tell: Callable[[int], None]) -> None:
        self.app, self.gate, self.tell = app, gate, tell

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        given_up = False

        async def patient(message: Message) -> None:
            nonlocal given_up
            if message["type"] == "http.response.start":
                self.tell(message["status"])
            try:
                await asyncio.wait_for(send(message), self.gate.patience)
            except asyncio.TimeoutError:
                given_up = True
                raise

        try:
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            self.gate.judge(scope["method"], scope["path"], headers)
            body = await asyncio.wait_for(self.whole(receive), self.gate.patience)
        except ValueError:  # of an Origin or a Host that is no address at all
            return await refuse(patient, Refused(400, "the header Host or Origin is malformed"))
        except asyncio.TimeoutError:
            return await refuse(patient, Refused(408, "the body did not come in time; send it faster, or send less"))
        except Refused as refused:
            return await refuse(patient, refused)
        if body is None:
            return None
        dense = b"\0" in body or structure(body) > self.gate.most // SPARSE  # UTF-16, which hides its quotes, has zeros
        if dense and self.gate.is_json(scope["path"]):
            return await refuse(patient, Refused(413, "the body is not UTF-8, or has too many lists and objects"))
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return parts.pop() if parts else await receive()

        try:
            return await self.app(scope, replayed, patient)
        except Exception:
            if not given_up:
                raise

    async def whole(self, receive: Receive) -> bytes | None:
        """Read the body, None if the client left. Raises Refused if it is too large."""
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= self.gate.most:
                body += part
            if size > self.gate.most and not (message.get("more_body") and size <= PASSED * self.gate.most):
                raise self.gate.too_large
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
