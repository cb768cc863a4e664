"""Makes documents shorter that have more tokens than a row may."""

from itertools import takewhile

Piece = tuple[list[int], bool]  # the tokens of a text, and whether they count in the loss


def length(pieces: list[Piece]) -> int:
    """The number of tokens of a document."""
    return sum(len(ids) for ids, _ in pieces)


def windows(pieces: list[Piece], most: int) -> list[list[Piece]]:
    """Cut a text into documents of at most `most` tokens, which all count. Each begins with the last token of the one
    before, so that every token is predicted."""
    ids = [token for part, _ in pieces for token in part]
    return [[(ids[begin : begin + most], True)] for begin in range(0, len(ids) - 1, most - 1)]


def shorten(pieces: list[Piece], excess: int, limit: int) -> list[Piece]:
    """Remove `excess` tokens from the front of the prompt, but not its last, then those beyond `limit` at the end."""
    prompt = sum(len(ids) for ids, _ in takewhile(lambda piece: not piece[1], pieces))
    first, shorter = min(excess, max(prompt - 1, 0)), []  # tokens [first, first + limit) stay
    for ids, counts in pieces:
        shorter.append((ids[max(first, 0) : max(first + limit, 0)], counts))
        first -= len(ids)
    return shorter
