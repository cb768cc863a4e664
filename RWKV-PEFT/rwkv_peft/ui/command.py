"""rwkv-peft ui: serves the page, until Ctrl-C."""

import secrets
import socket
import threading
import webbrowser
from pathlib import Path

import uvicorn

from ..errors import UserError
from .app import make_app
from .flags import parse_flags
from .guard import Page

HOST = "127.0.0.1"


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
        print("          Ctrl-C ends the page; what it started goes on", flush=True)
        if not options.no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        app = Page(make_app(Path(options.files)), key, port)
        server = uvicorn.Server(
            uvicorn.Config(app, ws="none", log_level="warning", access_log=False, server_header=False)
        )
        server.run(sockets=[listener])
    return 0
