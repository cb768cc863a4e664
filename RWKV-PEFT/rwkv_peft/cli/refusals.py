"""The refusals of a command line, gathered so that all are reported at once."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from .errors import UserError

FLAG = re.compile(r"--[A-Za-z]\w*")
Made = TypeVar("Made")


class Refusals:
    """Gathers messages. A message that names a flag of the `earlier` messages is left out: a flag that was refused
    there was read as if it had not been given, and that may contradict the rest."""

    def __init__(self, earlier: Sequence[str] = ()) -> None:
        self.earlier, self.messages = flags_in(earlier), list(earlier)

    def add(self, message: str) -> None:
        if not flags_in([message]) & self.earlier:
            self.messages.append(message)

    def attempt(self, make: Callable[..., Made], *arguments: Any) -> Made | None:
        """Return make(*arguments); None if an argument is None, or if it raises UserError; the message is added."""
        if any(argument is None for argument in arguments):
            return None
        try:
            return make(*arguments)
        except UserError as error:
            self.add(str(error))
            return None

    def gather(self, check: Callable[..., Iterator[str]], *arguments: Any) -> None:
        """Add each message that check(*arguments) yields, unless an argument is None."""
        for message in self.attempt(lambda *given: list(check(*given)), *arguments) or ():
            self.add(message)

    def tell(self) -> None:
        """Raise one UserError of all messages, if there are any."""
        if self.messages:
            raise in_one(self.messages)


def in_one(messages: Iterable[str]) -> UserError:
    """The UserError of all messages: one message as it is, several as a list."""
    lines = list(dict.fromkeys(messages))
    many = (f"{len(lines)} things are wrong with this command:", *(f"- {line}" for line in lines))
    return UserError(*(lines if len(lines) == 1 else many))


def flags_in(messages: Iterable[str]) -> set[str]:
    """The flags that messages name, without --help, which any message may name."""
    return {flag for message in messages for flag in FLAG.findall(message)} - {"--help"}


def require_none(check: Callable[..., Iterator[str]], *arguments: Any) -> None:
    """Raise a UserError of all messages that a check yields, if there are any."""
    refusals = Refusals()
    refusals.gather(check, *arguments)
    refusals.tell()
