"""The one exception that means "what you gave us is wrong", and how a command reports it and Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn


class UserError(ValueError):
    """A user's mistake: the message gives the value, the rule and the remedy."""


def exit_on_user_error(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's `main(argv) -> int`; a UserError becomes one message on stderr and exit code 2, Ctrl-C one word
    and exit code 130."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


@contextmanager
def ending_at_ctrl_c() -> Iterator[None]:
    """While large packages are imported: Ctrl-C ends the process at once, with one word and exit code 130.

    Some of them catch KeyboardInterrupt and go on without a part of themselves, others print it; nothing is open or
    half written yet.
    """

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(Exception):  # the interrupt may have come in the middle of a print
            sys.stdout.flush()
        os.write(2, b"interrupted\n")
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():  # signals are not its business
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
