"""Pairs of a context and what may follow it, many of which share their context, or its opening: each is read once."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..generate.decode import prefill
from ..models.state import State
from .scoring import score
from .task import Score

OPENING = 64  # tokens in which contexts agree that begin alike, as the same examples before each question let them
TOGETHER = 16  # continuations of a context that are scored at once, whatever the batch

Context = tuple[int, ...]


def score_pairs(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], batch: int, start: State | None = None
) -> Iterator[tuple[int, Score]]:
    """(its number, the Score) of each pair of a context (token ids, not empty) and a continuation (token ids; an empty
    one is certain), `batch` of them at a time; start is the State of one sequence before each context (None: zeros).
    Raises UserError as score does."""
    behind: dict[Context, list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if continuation:
            behind.setdefault(tuple(context), []).append(number)
        else:
            yield number, Score(0.0, True)
    for together in batches(behind, batch):
        shared = shared_opening(list(together))
        begun = prefill(model, [shared], start)[1] if shared else start
        rests = [list(context[len(shared) :]) for context in together]
        texts = [[pairs[number][1] for number in numbers] for numbers in together.values()]
        for numbers, scores in zip(together.values(), score(model, rests, texts, begun)):
            yield from zip(numbers, scores)


def batches(behind: Mapping[Context, list[int]], size: int) -> Iterator[dict[Context, list[int]]]:
    """{context: numbers of what follows it} in pieces of about `size` numbers: contexts that begin alike where they
    fill pieces of their own, else those of like length."""
    alike = Counter(context[:OPENING] for context in behind if len(context) > OPENING)

    def opening(context: Context) -> Context:
        return context[:OPENING] if alike[context[:OPENING]] >= size else ()

    most, batch, held, last = max(size, TOGETHER), dict[Context, list[int]](), 0, Context()
    for context in sorted(behind, key=lambda context: (opening(context), len(context))):
        numbers = behind[context]
        for first in range(0, len(numbers), most):
            piece = numbers[first : first + most]
            if batch and (held + len(piece) > size or opening(context) != last):
                yield batch
                batch, held = {}, 0
            batch[context], held, last = piece, held + len(piece), opening(context)
    if batch:
        yield batch


def shared_opening(contexts: Sequence[Context]) -> list[int]:
    """The tokens that all of several contexts begin with, where they are worth a pass of their own; at least one is
    left of each."""
    if len(contexts) < 2:
        return []
    shared = os.path.commonprefix(list(contexts))[: min(map(len, contexts)) - 1]
    return list(shared) if len(shared) >= OPENING else []
