"""Shortens documents that are too long, in pieces of tokens."""

Piece = tuple[list[int], bool]  # the tokens of a text, and whether they count in the loss


def length(pieces: list[Piece]) -> int:
    """The number of tokens of a document."""
    return sum(len(ids) for ids, _ in pieces)


def shorten(pieces: list[Piece], excess: int, limit: int) -> list[Piece]:
    """Remove `excess` tokens from the front of the prompt, but not its last, and then from the end those beyond
    `limit`."""
    prompt = 0
    for ids, counts in pieces:
        if counts:
            break
        prompt += len(ids)
    front = min(excess, max(prompt - 1, 0))
    back = max(0, length(pieces) - front - limit)
    shorter = []
    for ids, counts in pieces:
        cut = min(front, len(ids))
        front -= cut
        shorter.append((ids[cut:], counts))
    for index in reversed(range(len(shorter))):
        ids, counts = shorter[index]
        cut = min(back, len(ids))
        back -= cut
        shorter[index] = (ids[: len(ids) - cut], counts)
    return shorter
