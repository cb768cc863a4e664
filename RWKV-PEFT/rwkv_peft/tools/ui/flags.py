"""The flags of `rwkv-peft ui`, judged before any server is imported."""

import argparse
from pathlib import Path

from ...cli.errors import UserError
from ...cli.parser import Parser, port

PROG = "rwkv-peft ui"


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """argv -> the flags. Raises UserError for mistaken ones, and for a folder that is not there."""
    parser = Parser(
        prog=PROG,
        synonyms={
            **dict.fromkeys(("--folder", "--dir", "--root"), "--files"),
            **dict.fromkeys(("--host", "--share"), "`ssh -L 8600:127.0.0.1:8600 MACHINE`, run where the browser is"),
            "--open": "what it does by itself",
        },
        description="Serve a page on this machine to look at data, train, watch runs, chat with models and release "
        "them. It listens on 127.0.0.1 alone, and the address that it prints holds the key to it.",
    )
    parser.add_argument(
        "--files",
        default=".",
        metavar="FOLDER",
        help="the folder whose data, models and runs the page shows, and in which its commands run (default: the "
        "current one)",
    )
    parser.add_argument("--port", type=port, default=8600, help="0: any free one (default: 8600)")
    parser.add_argument("--no_browser", action="store_true", help="open no browser, only print the address")
    options = parser.parse_args(argv)
    if not Path(options.files).is_dir():
        raise UserError(f"--files {options.files}: no such folder; name the one that holds your data and models")
    return options
