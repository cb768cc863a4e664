"""The exception for a user's mistake, and how a command reports it and the signals that end the command."""

import codecs
import errno
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, MappingProxyType
from typing import Any, NoReturn, TextIO

UNSEEN = MappingProxyType(
    {
        errno.EACCES: "give yourself the permission, or name another place",
        errno.EPERM: "give yourself the permission, or name another place",
        errno.ENAMETOOLONG: "choose a shorter one",
        errno.ELOOP: "name another place",
    }
)
TOO_MANY_FILES = "this process may open no more files; raise its limit, as by ulimit -n 1024, and run again"
ROOM = "end other programs, take a smaller file or batch, or a machine with more (rwkv-peft plan counts a run's)"
# what reading a file may raise whose content is not what it should be
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
GPU_MEMORY = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure 2\b")
INTERRUPTED = "interrupted"
HANGUP: tuple[signal.Signals, ...] = ()  # the terminal went away
if sys.platform != "win32":
    HANGUP = (signal.SIGHUP,)
ENDINGS = MappingProxyType({signal.SIGTERM: "terminated"} | dict.fromkeys(HANGUP, "ended: the terminal is gone"))
# control characters other than tab and newline, Unicode's marks that break lines or turn the direction of writing, and
# halves of characters, which JSON may hold and no output can
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
TOLD = 200  # the most characters of a quoted text
LONGEST = 4000  # of a line of a message, which may quote several


class UserError(Exception):
    """A user's mistake: the message gives the value, the rule and the remedy. Its arguments are the message's lines,
    which may quote any file and path, and so each is shown as `in_line` makes it. It ends a command with the exit code
    `code`. It is no ValueError, so that nothing which handles those of libraries takes it for one. `offers` are flags
    of train.py, each with its value, by which the same command goes on: the page shows them as buttons."""

    code = 2

    def __init__(self, *lines: object, offers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(*lines)
        self.offers = list(offers)

    def __str__(self) -> str:
        return "\n".join(in_line(without_middle(str(line))) for line in self.args)


class NotNow(UserError):
    """A refusal that the same command may not meet a while later: what starts commands again (torchrun, a scheduler)
    tells it from a mistake by the exit code, which is EX_TEMPFAIL of sysexits.h."""

    code = 75


class Diverged(Exception):
    """A loss, gradient norm or trained tensor is not finite; all ranks raise it before that step is saved."""


class Ended(SystemExit):
    """Raised by a signal of ENDINGS, so that open files are closed on the way out and half-written ones removed."""

    def __init__(self, number: int) -> None:
        self.code: int
        super().__init__(128 + number)
        self.words = ENDINGS[signal.Signals(number)]


def ending_of(end: KeyboardInterrupt | Ended) -> tuple[str, int]:
    """The message and the exit code of a command that a signal ends."""
    return (end.words, end.code) if isinstance(end, Ended) else (INTERRUPTED, 128 + signal.SIGINT)


def summarize(error: BaseException, named: bool = False) -> str:
    """Return a one-line summary of a third-party exception; some quote a whole file. The exception's name leads if
    `named`, and if the text is empty or, as that of a LookupError, may be only a key."""
    lines = str(error).strip().splitlines()
    silent = named or not lines or isinstance(error, LookupError)
    words = ": ".join([type(error).__name__, *lines[:1]]) if silent else lines[0]
    return short(words)


def visible(text: str) -> str:
    """Make a text from a file safe to show on a terminal: characters that would move its cursor, change its colours or
    turn the direction of writing are escaped as Python does."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_line(text: str) -> str:
    """Make a text visible in one line, so that none of it passes for a line of a command's own."""
    return visible(text).replace("\n", "\\n")


def without_middle(line: str) -> str:
    """Cut a line to LONGEST characters: the value stands at its beginning, the rule and the remedy at its end."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}…{line[-LONGEST // 2 :]}"


def short(text: str) -> str:
    """Cut a text that is quoted to TOLD characters, in one line."""
    return in_line(text if len(text) <= TOLD else f"{text[:TOLD]}…")


def quoted(value: object) -> str:
    """Quote a value in a message, in one line."""
    return short(repr(value))


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few of names that are quoted, "a, b, c, …"."""
    return ", ".join(map(short, names[:limit])) + ", …" * (len(names) > limit)


def field_names(row: Iterable[object]) -> str:
    """The names of a row's fields, quoted."""
    return some([str(name) for name in row], 20) or "(none)"


def explained(error: BaseException) -> tuple[int, str] | None:
    """(exit code, message) for an exception that ends a command; None for one that only its traceback explains.

    These are a UserError; an OSError of UNSEEN about a file; a limit on open files that is reached; a full disk; full
    memory, also a GPU's, with the error's notes as the remedy; and Ctrl-C, SIGTERM and a terminal that goes away
    (SIGHUP), with 128 + the signal's number."""
    if isinstance(error, UserError):
        return error.code, f"error: {error}"
    if isinstance(error, OSError):  # any access to a file may find that its path is forbidden or malformed
        if error.errno == errno.EMFILE:  # of a pipe or a socket it names no file
            return 2, f"error: {TOO_MANY_FILES}"
        if error.errno == errno.ENOSPC and error.filename is None:  # of a log or a redirection
            return 2, "error: the disk is full; make room, and run again"
        advice = UNSEEN.get(error.errno or 0)
        if advice is not None and error.filename is not None:
            return 2, f"error: {short(str(error.filename))}: {str(error.strerror).lower()}; {advice}"
    if isinstance(error, MemoryError):
        return 2, f"error: no more memory is free ({summarize(error)}); {ROOM}"
    if is_gpu_memory(error):
        wanted = "".join(re.findall(r"Tried to allocate ([\d.]+ \w+)", str(error))[:1])
        remedy = "; ".join(getattr(error, "__notes__", ())) or ROOM
        return 2, f"error: the GPU's memory is full{f', and {wanted} more are needed' * bool(wanted)}; {remedy}"
    if isinstance(error, KeyboardInterrupt | Ended):
        return ending_of(error)[::-1]
    return None


def is_gpu_memory(error: BaseException) -> bool:
    """True for an error by which a GPU's memory is full: torch's own, CUDA's, cuBLAS's or NCCL's."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported here
        return True
    return isinstance(error, RuntimeError) and GPU_MEMORY.search(str(error)) is not None


def exit_on_user_error(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's `main(argv) -> int`, and exit with its code, or with the message and code of `explained`. If the
    reader of standard output left, as `head` does, the code is 141 (128 + SIGPIPE), without a message."""
    prepare_streams()
    try:
        with ending_in_order():
            code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not output_is_closed():
            raise
        code = 141
    except (Exception, KeyboardInterrupt, Ended) as error:
        if (found := explained(error)) is None:
            raise
        code, message = found
        sys.stdout.flush()
        print(message, file=sys.stderr)
    sys.exit(code)


def output_is_closed() -> bool:
    """True if the reader of standard output left. Buffered output, which Python would write at its exit, is dropped."""
    if sys.platform == "win32":  # which has no poll
        return True
    poll = select.poll()
    poll.register(1, 0)  # a pipe without a reader is reported in any case
    if closed := bool(poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed


def prepare_streams() -> None:
    """Print what cannot be encoded, such as file names that are not Unicode, escaped, and each line at once, also into
    a log. Read input in the locale's encoding, or in UTF-8 if that is ASCII; bytes that are no text in it become
    surrogates and raise no error yet."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        plain = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if plain else None, errors="surrogateescape")


def bar_seconds(stream: TextIO) -> float:
    """Seconds between two prints of a progress bar: short on a terminal, long in a log, which keeps them all."""
    return 0.2 if stream.isatty() else 10.0


def encoded(text: str) -> bytes:
    """A text as UTF-8; a lone surrogate, which that cannot hold, becomes JSON's escape of it."""
    return text.encode("utf-8", "backslashreplace")


def past_ctrl_c() -> None:
    """Ignore Ctrl-C from now on, in a process that only has to exit: packages may take a second for that, and Ctrl-C
    would change the exit code and print a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def hangup_signals() -> tuple[signal.Signals, ...]:
    """The signals that tell of a terminal that went away; () if they are ignored, as under nohup."""
    return tuple(number for number in HANGUP if signal.getsignal(number) != signal.SIG_IGN)


def give_back(handlers: Mapping[signal.Signals, Any]) -> None:
    """Restore signals' handlers {number: handler}, but not of a SIGHUP that is ignored by now, because further ones
    follow when a terminal goes away."""
    for number, handler in handlers.items():
        if number not in HANGUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Give back the handlers of Ctrl-C and ENDINGS that others set within."""
    known = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDINGS)}
    before = {number: handler for number, handler in known.items() if handler is not None}  # None: not Python's own
    try:
        yield
    finally:
        give_back(before)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within, the first signal of ENDINGS raises Ended, and a second one ends the process at once, but SIGHUP is
    ignored then, because both the system and the shell send it. Only signals with their default handler are caught."""

    def end(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN if other in HANGUP else signal.SIG_DFL)
        raise Ended(number)

    before = {number: signal.SIG_DFL for number in ENDINGS if signal.getsignal(number) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        give_back(before)
