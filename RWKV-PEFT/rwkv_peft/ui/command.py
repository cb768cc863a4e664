"""rwkv-peft ui: serves the page, until Ctrl-C, which also closes the models that chats hold in memory."""

import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from ..errors import UserError
from .app import make_app
from .chat import close_chats
from .flags import parse_flags
from .guard import Page
from .jobs import Jobs

HOST = "127.0.0.1"
PATIENCE = 5  # seconds that an answer may go on when the page ends


def main(argv: list[str]) -> int:
    options = parse_flags(argv)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, options.port))
            listener.listen(128)  # a browser that is quick waits
        except OSError as error:
            raise UserError(
                f"--port {options.port} cannot be had ({error.strerror}); another page may be open there: give --port 0"
            ) from error
        port, key = listener.getsockname()[1], secrets.token_urlsafe(24)
        address = f"http://{HOST}:{port}/?key={key}"
        print(f"page      {address}")
        print(f"files     {Path(options.files).resolve()}")
        print("          Ctrl-C ends the page and its chats; runs go on", flush=True)
        if not options.no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        jobs = Jobs(Path(options.files).resolve())
        app = Page(make_app(Path(options.files), jobs), key, port)
        config = uvicorn.Config(
            app,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=PATIENCE,
        )
        Server(config, partial(close_chats, jobs)).run(sockets=[listener])
    return 0


class Server(uvicorn.Server):
    """Calls `leave` in a thread when Ctrl-C or SIGTERM ends it, before it waits for answers that still go on."""

    def __init__(self, config: uvicorn.Config, leave: Callable[[], None]) -> None:
        super().__init__(config)
        self.leave = leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        threading.Thread(target=self.leave).start()
        super().handle_exit(sig, frame)
