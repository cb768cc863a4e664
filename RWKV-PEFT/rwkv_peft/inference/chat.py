"""An interactive chat in the layout of the training data (data/templates.py): `rwkv-peft generate --chat`.

Lines come from standard input, a terminal or a pipe; answers stream to standard output, remarks to standard error.
"""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from ..checkpoints.atomic import check_output, same_file
from ..checkpoints.state_file import check_session_output
from ..cli.errors import UserError, short
from ..data.templates import before_answer, question
from ..data.tools import parse_calls
from .loading import save_state_file
from .session import Session
from .showing import show

HELP = (
    "/reset forgets the chat, /save FILE keeps it for --state, /tool TEXT is the result of a call, /exit or Ctrl-D "
    "ends it; Ctrl-C ends an answer, twice the chat"
)
CODE = 130  # the exit code after Ctrl-C


class Manner(NamedTuple):
    """How answers are asked for: think ("", "on", "off") opens them, system and tools (tools_text) come before the
    first turn, also after /reset ("": none), and clean tells whether lines, results and system are cleaned (turns.py).
    """

    think: str = ""
    system: str = ""
    tools: str = ""
    clean: bool = True


class Chat:
    """The loop of a chat over a Session.

    stops end an answer; change(line) is applied to a line before it is sent; inputs are the (flag, path) pairs that
    /save must not overwrite, except --state, because a session may go on in its own file. If an answer calls tools, so
    many results are awaited before the next one.
    """

    def __init__(
        self,
        session: Session,
        stops: Sequence[str],
        max_tokens: int,
        change: Callable[[str], str],
        inputs: Sequence[tuple[str, str | None]],
        manner: Manner,
    ) -> None:
        self.session, self.stops, self.max_tokens, self.change = session, stops, max_tokens, change
        self.inputs = [(flag, path) for flag, path in inputs if flag != "--state"]
        self.replaceable = [path for flag, path in inputs if flag == "--state" and path]
        self.manner = manner
        self.awaited, self.results = 1, list[str]()

    def run(self) -> int:
        """Talk until the input ends -> the exit code. A UserError is printed on a terminal and raised if the lines come
        from a pipe or a file. Raises Unheard if nobody reads the output any more."""
        remark(HELP)
        read, interrupted = line_reader(), False
        while True:
            try:
                line = read()
                if line is None:
                    return 0
                interrupted = False
                if line.startswith("/"):
                    if not self.command(*line.split(maxsplit=1)):
                        return 0
                elif line.strip():
                    self.answer(self.change(line))
            except KeyboardInterrupt:
                if interrupted:
                    remark("\ninterrupted")
                    return CODE
                interrupted = True
                remark("\n(Ctrl-C again ends the chat)")
            except UserError as error:
                if not sys.stdin.isatty():
                    raise
                remark(f"error: {error}")

    def answer(self, words: str) -> None:
        manner = self.manner if self.session.begins else self.manner._replace(system="", tools="")
        self.say(question(words, *manner))

    def take_result(self, text: str) -> None:
        """Take the result of a call; the last that is awaited is answered."""
        self.results.append(text)
        if len(self.results) < self.awaited:
            remark(f"(call {len(self.results) + 1} of {self.awaited}: its result?)")
            return
        turns = [("tool", result) for result in self.results]
        self.say(before_answer(turns, self.manner.think, self.manner.clean))

    def say(self, texts: Sequence[str]) -> None:
        """Show the answer to texts, and the calls that it holds."""
        self.results, shown = [], list[str]()
        show(texts[-1])
        try:
            for text in self.session.answer(texts, self.stops, self.max_tokens):
                show(text)
                shown.append(text)
        finally:
            show("\n\n")
        opening = texts[-1].partition(":")[2]  # that of a thinking, in which nothing is called
        _, calls = parse_calls(opening + "".join(shown))
        self.awaited = max(1, len(calls))
        for number, call in enumerate(calls, start=1):
            remark(f"(call {number} of {len(calls)}: {call}; /tool TEXT is its result)")
        if self.session.cut:
            remark(f"(cut off after --max_tokens {self.max_tokens})")

    def command(self, name: str, argument: str = "") -> bool:
        """Execute a line that begins with / -> False if it ends the chat."""
        argument = argument.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/reset":
            self.session.reset()
            self.awaited, self.results = 1, []
            remark("the chat is forgotten")
        elif name == "/tool" and argument and not self.session.begins:
            self.take_result(self.change(argument))
        elif name == "/save" and argument:
            self.save(argument)
        else:
            remark(HELP)
        return True

    def save(self, path: str) -> None:
        """Write the state after the last turn. A UserError is printed, and the chat goes on."""
        try:
            check_session_output("/save", path)
            check_output("/save", path, self.inputs)
            self.session.close()
            if self.session.state is None:
                raise UserError("/save: nothing was said yet")
            self.check_replaced(path)
            save_state_file(path, self.session.state, self.session.model)
            remark(f"saved; rwkv-peft generate --chat --state {shlex.quote(path)} goes on from here")
        except UserError as error:
            remark(f"error: {error}")

    def check_replaced(self, path: str) -> None:
        """Raise UserError, the first time, if /save would replace a file that this chat was not loaded from and did not
        save."""
        known = any(same_file(path, own) for own in self.replaceable)
        self.replaceable.append(path)
        if os.path.exists(path) and not known:
            raise UserError(f"/save {path}: there is such a file; the same line once more replaces it")


def line_reader() -> Callable[[], str | None]:
    """Make a function that reads a line without its newline, None at the end of the input.

    On a terminal it prompts, and offers editing if there is readline. It raises UserError for a line that is not in the
    input's encoding.
    """
    if not sys.stdin.isatty():
        return lambda: readable(line.rstrip("\r\n")) if (line := sys.stdin.readline()) else None
    with suppress(ImportError):  # some Pythons lack it
        import readline  # noqa: F401  the import lets input() edit lines

    def ask() -> str | None:
        try:
            return readable(input("User: "))
        except EOFError:
            show("\n")
            return None

    return ask


def readable(line: str) -> str:
    """Return the line. Raises UserError if it holds surrogates: bytes that are not in the input's encoding."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the line {short(line[: error.start])}… is not {sys.stdin.encoding} from its character {error.start + 1} "
            "on, and was not sent; convert it"
        ) from error
    return line


def remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
