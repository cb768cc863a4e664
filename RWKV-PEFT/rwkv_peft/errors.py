"""The one exception that means "what you gave us is wrong", and how a command reports it and the signals that end
it."""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from .streams import lost_output, make_patient

UNSEEN = MappingProxyType(
    {
        errno.EACCES: "give yourself the permission, or name another place",
        errno.EPERM: "give yourself the permission, or name another place",
        errno.ENAMETOOLONG: "choose a shorter one",
        errno.ELOOP: "name another place",
    }
)
INTERRUPTED = "interrupted"
ENDINGS = MappingProxyType({signal.SIGTERM: "terminated", signal.SIGHUP: "ended: the terminal is gone"})
# all but tab and newline; of Unicode's marks, those that turn the order of what stands beside them
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
TOLD = 200  # characters of what is quoted that are worth reading


class UserError(ValueError):
    """A user's mistake: the message gives the value, the rule and the remedy. It may quote any file."""

    def __str__(self) -> str:
        return visible(super().__str__())


class Ended(SystemExit):
    """A signal of ENDINGS came: what is open is put in order on the way out, and half a file does not stay."""

    def __init__(self, number: int) -> None:
        self.code: int
        super().__init__(128 + number)
        self.words = ENDINGS[signal.Signals(number)]


def ending_of(end: KeyboardInterrupt | Ended) -> tuple[str, int]:
    """The words and the exit code of a command that a signal ends."""
    return (end.words, end.code) if isinstance(end, Ended) else (INTERRUPTED, 128 + signal.SIGINT)


def told(error: BaseException, named: bool = False) -> str:
    """What another library's exception says, in one short line: some quote a whole file, or say nothing but a key; with
    the exception's name before it where that alone may say what is wrong."""
    lines = str(error).strip().splitlines()
    silent = named or not lines or isinstance(error, LookupError)
    words = " ".join([type(error).__name__, *lines[:1]]) if silent else lines[0]
    return short(words)


def visible(text: str) -> str:
    """A text from a file as a terminal may show it: characters that would move its cursor, change its colours or turn
    the direction of writing stand there as Python writes them."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def short(text: str) -> str:
    """A text to quote, cut where it is long."""
    return text if len(text) <= TOLD else f"{text[:TOLD]}…"


def exit_on_user_error(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's `main(argv) -> int`; a UserError becomes one message on stderr and exit code 2, and so does what
    may not be looked at; Ctrl-C one word and exit code 130, SIGTERM one and 143, a terminal that goes away a few and
    129. Its streams are patient from then on (streams.py)."""
    make_patient()
    try:
        with ending_in_order():
            code = main(sys.argv[1:])
        if code or not (reason := lost_output()):
            sys.exit(code)
        message, code = f"error: all is done, but what was printed is not whole: {reason}", 2
    except UserError as error:
        message, code = f"error: {error}", 2
    except OSError as error:  # of a name that may not be looked at, which any look finds
        advice = UNSEEN.get(error.errno or 0)
        if advice is None or error.filename is None:
            raise
        message, code = f"error: {short(str(error.filename))}: {str(error.strerror).lower()}; {advice}", 2
    except (KeyboardInterrupt, Ended) as end:
        message, code = ending_of(end)
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


def past_ctrl_c() -> None:
    """For a process that has done all but leave, which may take packages a second: a Ctrl-C changes no exit code any
    more, and prints nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def hangup_signals() -> tuple[signal.Signals, ...]:
    """What tells that a terminal went away, as a tuple: none where that is to be ignored, as under nohup."""
    return () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)


def give_back(handlers: Mapping[signal.Signals, Any]) -> None:
    """Give signals the handlers {number: handler} that they had before, but for one that is ignored by now: that of a
    terminal that went away, which more of them are about to tell."""
    for number, handler in handlers.items():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within, the first signal of ENDINGS that is not ignored raises Ended; a second one ends the process at once, but
    for that of a terminal, which the system sends, and the shell too."""

    def end(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN if other == signal.SIGHUP else signal.SIG_DFL)
        raise Ended(number)

    before = {number: signal.SIG_DFL for number in ENDINGS if signal.getsignal(number) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        give_back(before)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While large packages are imported: Ctrl-C, and a signal of ENDINGS that would raise, end the process at once,
    with their words and exit code.

    Some packages catch KeyboardInterrupt and go on without a part of themselves, others print it; nothing is open or
    half written yet.
    """

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(Exception):  # the signal may have come in the middle of a print
            sys.stdout.flush()
        with suppress(OSError):  # of a terminal that is gone
            os.write(2, ENDINGS.get(signal.Signals(number), INTERRUPTED).encode() + b"\n")
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals are not its business
        yield
        return
    before = {number: now for number in (signal.SIGINT, *ENDINGS) if callable(now := signal.getsignal(number))}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
