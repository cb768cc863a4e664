"""Score pairs of a context and a continuation. In a batch, a context or opening that several pairs share is read
once."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..generate.reading import prefill
from ..models.state import State
from .scoring import score
from .task import Score

OPENING = 64  # contexts count as beginning alike if this many tokens agree, as with the same examples before a question
TOGETHER = 16  # continuations of one context that are scored at once even if the batch is smaller

Context = tuple[int, ...]


def score_pairs(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], batch: int, start: State | None = None
) -> Iterator[tuple[int, Score]]:
    """Yield (number, Score) of each pair of a context (token ids, not empty) and a continuation (token ids; an empty
    one has probability 1), about `batch` pairs at a time; start is the State of one sequence before each context (None:
    zeros). Raises UserError as score does."""
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
    """Split {context: numbers of its continuations} into batches of about `size` numbers. Contexts that begin alike are
    batched together if there are at least `size` of them, and the rest by length."""
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
    """The tokens that all contexts begin with, which leave at least one token of each; [] if they are fewer than
    OPENING and so not worth a pass, or if there is only one context."""
    if len(contexts) < 2:
        return []
    shared = os.path.commonprefix(list(contexts))[: min(map(len, contexts)) - 1]
    return list(shared) if len(shared) >= OPENING else []
