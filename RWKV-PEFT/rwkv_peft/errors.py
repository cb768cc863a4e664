"""The one exception that means "what you gave us is wrong", and how a command reports it."""

import sys
from collections.abc import Callable
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
