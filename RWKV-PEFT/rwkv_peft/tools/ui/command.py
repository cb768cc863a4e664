"""rwkv-peft ui: serves the page, until Ctrl-C, which also closes the models that chats hold in memory."""

import secrets
import tempfile
import threading
import webbrowser
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import IO

from ...cli.errors import UserError
from ...inference.serve.web import Gate, Guard, bound, run
from .app import FILES, make_app
from .files import hidden
from .flags import parse_flags
from .jobs import Jobs, close_chats

HOST = "127.0.0.1"
DRAIN = 5  # seconds that an answer may go on when the page ends
PATIENCE = 60.0  # seconds for a client that is slow
MOST_BYTES, PART_BYTES = 1 << 20, 1 << 24  # of a request's body, and of a part of a file


def main(argv: list[str]) -> int:
    options = parse_flags(argv)
    root = Path(options.files).resolve()
    with bound(HOST, options.port) as listener, ExitStack() as stack:
        port, key = listener.getsockname()[1], secrets.token_urlsafe(24)
        address = f"http://{HOST}:{port}/?key={key}"
        # cookies of one host are shared by its ports
        gate = Gate((), (), key, MOST_BYTES, PATIENCE, ("/",), f"rwkv-peft-{port}", {FILES: PART_BYTES})
        jobs = Jobs(root)

        def begin() -> None:
            print(f"page      {address}")
            print(f"files     {root}")
            print("          Ctrl-C ends the page and its chats; runs go on", flush=True)
            if not options.no_browser:
                with suppress(OSError, UserError):  # a folder that cannot be written; the address stands above
                    file = stack.enter_context(entrance(address, hidden(root, "page")))
                    threading.Thread(target=webbrowser.open, args=(Path(file.name).as_uri(),), daemon=True).start()

        run(Guard(make_app(root, jobs, gate), gate), listener, PATIENCE, DRAIN, begin, partial(close_chats, jobs))
    return 0


def entrance(address: str, folder: Path) -> IO[str]:
    """A file that leads a browser to an address with a key. Only its owner reads it, and all users of a machine read
    the command line of a browser. It is gone once it is closed."""
    file = tempfile.NamedTemporaryFile("w", suffix=".html", dir=folder)
    file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">')
    file.flush()
    return file
