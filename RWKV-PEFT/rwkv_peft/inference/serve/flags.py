"""The flags of `rwkv-peft serve`, checked before torch is imported."""

import argparse
import ipaddress
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...cli.errors import UserError, short
from ...cli.parser import Parser, above_zero, constrained, count, port, positive
from ...cli.rules import EXCLUDES, NEEDS, Refusals, Rule
from ..flags import add_feedback_flag, add_running_flags, add_sampling_flags, sampling_of
from ..settings import Sampling

PROG = "rwkv-peft serve"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,63}")
SHORTEST_KEY = 16  # characters
SOURCE = "env:"  # begins a value of --api_key that names a variable
REACHED = "an address that others reach"
RULES = (
    Rule(REACHED, NEEDS, "--api_key", "who reaches it may use it", "give one"),
    Rule("--cache_folder", EXCLUDES, "--known_mib 0", "nothing is cached then", "give more"),
)
USAGE = """Answer over HTTP as OpenAI's interface does.

    rwkv-peft serve --model base.pth
    rwkv-peft serve --model base.pth --adapter poet=out/poet coder=coder.safetensors --state calm=calm.pth

Each adapter and each state is a model of its own by its name; they share the base's weights.
"""


class Named(NamedTuple):
    """NAME=FILE: the name in requests, and the path."""

    name: str
    path: str


def named(text: str) -> Named:
    """NAME=FILE as a Named; a FILE by itself has its own name without the ending."""
    name, equals, path = text.partition("=")
    found = Named(name, path) if equals else Named(Path(text).stem, text)
    if not found.path or not NAME.fullmatch(found.name):
        raise argparse.ArgumentTypeError(f"{short(text)} is not NAME=FILE, with a name of letters, digits and ._:+-")
    return found


model_name = constrained(str, NAME.fullmatch, "is no name of at most 64 letters, digits and ._:+-")


def build_parser() -> Parser:
    parser = Parser(
        prog=PROG,
        rules=RULES,
        facts=lambda args: {REACHED: "" if is_loopback(args.host) else args.host},
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Callable[..., object] = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="an RWKV model, or its folder from Hugging Face")
    add("--name", type=model_name, help="its name in requests (default: the file's name without its ending)")
    for kind in ("adapter", "state"):
        text = f"{kind}s, each a model by its name (default: the file's)"
        add(f"--{kind}", type=named, nargs="+", action="extend", default=[], metavar="[NAME=]FILE", help=text)
    text = "keep states by name in this folder, for clients to save after answers, upload, download and delete"
    add("--states", metavar="FOLDER", help=text)
    add("--files", metavar="FOLDER", help="let clients load adapters and states from below this folder")
    add_feedback_flag(add, "append what clients say of chats' answers (POST /v1/feedback) to this file")
    add_running_flags(parser)
    parser.set_defaults(batch=64)
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine alone)")
    add("--port", type=port, default=8000, help="port to listen on; 0 takes any free one (default 8000)")
    text = "listen on 11434 instead, where clients of Ollama look, if that port is free"
    add("--ollama", action="store_true", help=text)
    add(
        "--api_key",
        metavar="FILE|env:NAME",
        help="file or environment variable that holds the key which clients must give; never the key itself, because "
        "other users of the machine see command lines",
    )
    add(
        "--allow_host",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="names by which clients may call it besides localhost",
    )
    add(
        "--allow_origin",
        nargs="+",
        action="extend",
        default=[],
        metavar="ORIGIN",
        help="sites whose pages may call it from a browser, such as https://chat.example.org",
    )
    add("--max_tokens", type=positive, default=2048, help="the most tokens of an answer (default 2048)")
    add("--max_prompt", type=positive, default=65536, help="the most tokens of a prompt (default 65536)")
    add("--max_seconds", type=above_zero, default=600.0, help="the longest that an answer may take (default 600)")
    add("--max_loaded", type=count, default=32, help="the most adapters and states that clients load (default 32)")
    add("--queue", type=count, default=128, help="the most answers that wait for a place in the batch (default 128)")
    add("--body_mib", type=positive, default=4, help="the largest body of a request, in MiB (default 4)")
    add(
        "--known_mib",
        type=count,
        default=1024,
        help="memory for cached states of prompts and answers, in MiB (default 1024)",
    )
    text = "write these states there when the server ends, and read them when it starts with the same model"
    add("--cache_folder", metavar="FOLDER", help=text)
    add("--client_seconds", type=above_zero, default=30.0, help="the longest wait for a slow client (default 30)")
    add("--drain_seconds", type=count, default=30, help="the longest wait for answers after SIGTERM (default 30)")
    add_sampling_flags(parser)
    return parser


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, Sampling]:
    """Parse argv -> the flags, with the name of the model, and the default Sampling of requests. Raises
    UserError for flags that are mistaken or contradict each other."""
    args = build_parser().parse_args(argv)
    refusals = Refusals()
    args.name = args.name or re.sub(r"[^A-Za-z0-9._:+-]", "-", Path(args.model).stem).lstrip("._:+-")[:64] or "model"
    names = [args.name, *(given.name for given in (*args.adapter, *args.state))]
    for name in sorted({name for name in names if names.count(name) > 1}):
        refusals.add(f"{name} names two models; give each adapter and state a name of its own, and the base a --name")
    for flag in ("files", "states", "cache_folder"):
        folder = getattr(args, flag)
        if folder is not None and not os.path.isdir(folder):
            refusals.add(f"--{flag} {folder}: no such folder; name one that is there")
    with refusals.collecting():
        sampling = sampling_of(args)
    with refusals.collecting():
        args.key = read_key(args.api_key) if args.api_key else None
    refusals.raise_all()
    return args, sampling


def read_key(given: str) -> str:
    """The key in the file or variable of --api_key. Raises UserError if there is none, or a short one."""
    if given.startswith(SOURCE):
        key, place = os.environ.get(given.removeprefix(SOURCE), ""), "the variable"
    elif os.path.isfile(given):
        key, place = Path(given).read_text(encoding="utf-8", errors="replace"), "the file"
    else:
        raise UserError(
            "--api_key: no such file; name a file or, as env:NAME, a variable that holds the key, not the key itself"
        )
    key = key.strip()
    if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"--api_key {given}: {place} holds no key of at least {SHORTEST_KEY} visible ASCII characters; "
            "make one with openssl rand -hex 32"
        )
    return key
