"""Serve a model over HTTP: `rwkv-peft serve --help`."""

import argparse
import asyncio
import socket
import sys

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import Ended, UserError
from .app import make_app
from .catalog import Catalog
from .flags import parse_flags
from .service import Service

CONNECTIONS = 512  # the most at a time; a process may have 1,024 open files


class Protocol(H11Protocol):
    """A connection that ends if the head of a request does not come in time, and if there are too many others."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def _await_head(self) -> None:
        """Look after the time of a keep-alive whether a request has begun since."""
        cycle = self.cycle

        def look() -> None:
            if self.cycle is cycle and (cycle is None or cycle.response_complete):
                self.transport.abort()

        self.loop.call_later(self.timeout_keep_alive, look)


class Server(uvicorn.Server):
    """Prints `words` when it listens."""

    words = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.words, flush=True)


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C -> the exit code. Raises UserError for mistakes in flags and files."""
    args, defaults = parse_flags(argv)
    with bound(args) as listener:
        catalog = Catalog(args)
        service = Service(args, defaults, catalog)
        server = Server(
            uvicorn.Config(
                make_app(service, args),
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=max(1, round(args.client_seconds)),
                timeout_graceful_shutdown=args.drain_seconds,
            )
        )
        host, port = listener.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        server.words = f"{', '.join(catalog.voices)}: http://{where}/v1"
        try:
            server.run(sockets=[listener])
        except (KeyboardInterrupt, Ended):  # uvicorn has drained by then, and sends itself the signal once more
            print("stopped", file=sys.stderr)
    return 0


def bound(args: argparse.Namespace) -> socket.socket:
    """A socket at the address of the flags. Raises UserError if there is none to have."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            args.host, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {args.host} --port {args.port}: {error.strerror}; choose another, as --port 0 for any free one"
        ) from error
    return listener
