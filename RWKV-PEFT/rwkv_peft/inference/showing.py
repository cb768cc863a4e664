"""Print generated text piece by piece, as long as somebody reads standard output."""

import sys

from ..cli.streams import is_heard


class Unheard(Exception):
    """The reader of standard output left, as `head` does, so that there is nothing more to do."""


def show(text: str) -> None:
    """Print a piece of generated text. Raises Unheard if nobody reads it any more."""
    print(text, end="", flush=True)
    if not is_heard(sys.stdout):
        raise Unheard
