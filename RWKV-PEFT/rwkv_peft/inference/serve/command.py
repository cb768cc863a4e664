"""Serve a model over HTTP: `rwkv-peft serve --help`."""

from .app import make_app
from .catalog import Catalog
from .flags import parse_flags
from .service import Service
from .web import bound, run


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C -> the exit code. Raises UserError for mistakes in flags and files."""
    args, defaults = parse_flags(argv)
    with bound(args.host, args.port) as listener:
        catalog = Catalog(args)
        app = make_app(Service(args, defaults, catalog), args)
        host, port = listener.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        words = f"{', '.join(catalog.voices)}: http://{where}/v1"
        run(app, listener, args.client_seconds, args.drain_seconds, lambda: print(words, flush=True))
    return 0
