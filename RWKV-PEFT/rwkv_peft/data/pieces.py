"""Shortens documents that are too long, in pieces of tokens."""

from itertools import takewhile

Piece = tuple[list[int], bool]  # the tokens of a text, and whether they count in the loss


def length(pieces: list[Piece]) -> int:
    """The number of tokens of a document."""
    return sum(len(ids) for ids, _ in pieces)


def shorten(pieces: list[Piece], excess: int, limit: int) -> list[Piece]:
    """Remove `excess` tokens from the front of the prompt, but not its last, and then from the end those beyond
    `limit`."""
    prompt = sum(len(ids) for ids, _ in takewhile(lambda piece: not piece[1], pieces))
    first, shorter = min(excess, max(prompt - 1, 0)), []  # tokens [first, first + limit) stay
    for ids, counts in pieces:
        shorter.append((ids[max(first, 0) : max(first + limit, 0)], counts))
        first -= len(ids)
    return shorter
