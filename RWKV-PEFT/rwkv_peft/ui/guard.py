"""Lets only the person who started the page use it.

What the page can do, that person can do: start programs and write files. So every request must carry the key of the
address that was printed, as a cookie that other sites' requests do not carry; another user of this machine has no key.
Host and Origin must be this server's own, so that neither a name that is bound to 127.0.0.1 nor another site gets in.
"""

import hmac
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from ..serve.guard import App, Gate, Guard, Message, Receive, Send
from ..serve.refused import Refused

MOST_BYTES = 1 << 20  # of a request's body
FILES = "/api/files"  # takes the bytes of files
PATIENCE = 60.0  # seconds for a client that is slow
HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class PageGate(Gate):
    """A Gate whose key is the value of a cookie, and whose hosts have their port."""

    cookie: str

    def judge(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raise Refused for a request that may not be answered."""
        host = headers.get("host", "")
        if host not in self.hosts:
            raise Refused(403, "this page is served at the address that rwkv-peft ui printed, and at no other name")
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            raise Refused(403, "requests from other sites are refused")
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            cookie = None
        given = cookie.value if cookie else ""
        if not hmac.compare_digest(given.encode("utf-8", "replace"), str(self.key).encode()):
            raise Refused(403, "open the address that rwkv-peft ui printed, with its key")
        self.judge_size(headers)

    def is_json(self, path: str) -> bool:
        return path != FILES

    @property
    def too_large(self) -> Refused:
        return Refused(413, f"a request has at most {self.most:,} bytes")


class Page:
    """An ASGI application around the page's: answers who has the key, and adds HEADERS to each answer."""

    def __init__(self, app: App, key: str, port: int) -> None:
        hosts = tuple(f"{name}:{port}" for name in ("127.0.0.1", "localhost"))
        # cookies of one host are shared by its ports
        gate = PageGate(hosts, (), key, MOST_BYTES, PATIENCE, f"rwkv-peft-{port}")
        self.cookie = f"{gate.cookie}={key}; HttpOnly; SameSite=Strict; Path=/".encode()
        self.name = gate.cookie
        self.pages, self.door = (Guard(one, gate, lambda status: None) for one in (app, self.enter))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [""])[0]
        if not given:
            return await self.pages(scope, receive, with_headers)
        headers = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
        scope = {**scope, "headers": [*headers, (b"cookie", f"{self.name}={given}".encode())]}
        await self.door(scope, receive, with_headers)

    async def enter(self, scope: Message, receive: Receive, send: Send) -> None:
        """Put the key of the printed address into a cookie, and out of the address."""
        headers = [(b"location", b"/"), (b"set-cookie", self.cookie)]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
