"""The one exception that means "what you gave us is wrong", and how a command reports it."""

import io
import sys
from collections.abc import Callable
from typing import NoReturn

TOLD = 200  # characters of what is quoted that are worth reading


class UserError(ValueError):
    """A user's mistake: the message gives the value, the rule and the remedy."""


def told(error: BaseException) -> str:
    """What another library's exception says, in one short line: some quote a whole file, or say nothing but a key."""
    lines = str(error).strip().splitlines()
    words = lines[0] if lines and not isinstance(error, LookupError) else " ".join([type(error).__name__, *lines[:1]])
    return short(words)


def short(text: str) -> str:
    """A text to quote, cut where it is long."""
    return text if len(text) <= TOLD else f"{text[:TOLD]}…"


def exit_on_user_error(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's `main(argv) -> int`; a UserError becomes one message on stderr and exit code 2, Ctrl-C one word
    and exit code 130. What a file's names hold may be no Unicode, and is shown escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)
