"""Lets only the person who started the page use it.

What the page can do, that person can do: start programs and write files. So every request must carry the key of the
address that was printed, as a cookie that other sites' requests do not carry; another user of this machine has no key.
Host and Origin must be this server's own, so that neither a name that is bound to 127.0.0.1 nor another site gets in.
"""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
MOST_BYTES = 1 << 20  # of a request's body
HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class TooLarge(Exception):
    """The body of a request is larger than MOST_BYTES."""


class Guard:
    """An ASGI application that hands requests on to `app` if they come from the page of the key's holder."""

    def __init__(self, app: Any, key: str, port: int) -> None:
        self.app, self.key, self.port = app, key, port
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [""])[0]
        if refusal := self.refusal(headers, given):
            await answer(send, *refusal)
        elif given:  # the address that was printed: the key goes into a cookie, and out of the address
            cookie = f"{self.cookie}={self.key}; HttpOnly; SameSite=Strict; Path=/".encode()
            await answer(send, 303, "", [(b"location", b"/"), (b"set-cookie", cookie)])
        else:
            await self.hand_on(scope, receive, send)

    @property
    def cookie(self) -> str:
        """The cookie's name; cookies of one host are shared by its ports."""
        return f"rwkv-peft-{self.port}"

    def refusal(self, headers: dict[str, str], given: str) -> tuple[int, str] | None:
        """The status and reason with which a request is refused, or None."""
        if headers.get("host", "") not in self.hosts:
            return 403, "this page is served at the address that rwkv-peft ui printed, and at no other name"
        if headers.get("origin", f"http://{headers['host']}") != f"http://{headers['host']}":
            return 403, "requests from other sites are refused"
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            cookie = None
        held = given or (cookie.value if cookie else "")
        if not hmac.compare_digest(held.encode("utf-8", "replace"), self.key.encode()):
            return 403, "open the address that rwkv-peft ui printed, with its key"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return 413, f"a request has at most {MOST_BYTES:,} bytes"
        return None

    async def hand_on(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let `app` answer, with HEADERS; a body without a length is counted as it comes."""
        read, begun = 0, False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                raise TooLarge
            return message

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except TooLarge:
            if not begun:
                await answer(send, 413, f"a request has at most {MOST_BYTES:,} bytes")


async def answer(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send a whole answer of plain text."""
    kind = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *HEADERS, *(headers or [])]})
    await send({"type": "http.response.body", "body": text.encode()})
