"""What is generated, piece by piece on standard output, for as long as somebody reads it."""

import sys

from ..streams import is_heard


class Unheard(Exception):
    """The reader of what is printed left, as `head` does, and it was for that reader alone."""


def show(text: str) -> None:
    """Print a piece of what is generated. Raises Unheard where nobody reads it any more."""
    print(text, end="", flush=True)
    if not is_heard(sys.stdout):
        raise Unheard
