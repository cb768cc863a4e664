"""Log-probabilities of continuations. A prompt, or a long prefix that several prompts share, is read once."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..cli.errors import UserError
from ..inference.forward import PREFILL, prefill
from ..models.state import State
from ..ops.decode import product

PIECE = 256  # tokens whose logits are formed at a time
PREFIX = 64  # contexts share a prefix worth a pass of its own if so many first tokens agree, as with few-shot examples
TOGETHER = 16  # continuations of one context that are scored at once even if the batch is smaller
Context = tuple[int, ...]
Pairs = list[tuple[float, bool]]  # of each token: its log-probability, and True if it is the most probable


class Score(NamedTuple):
    """The log-probability of a continuation, in nats; greedy is True if each of its tokens is the most probable."""

    logprob: float
    greedy: bool


@torch.inference_mode()
def score(
    model: Any, prompts: Sequence[list[int]], continuations: Sequence[Sequence[list[int]]], start: State | None = None
) -> list[list[Score]]:
    """Score each prompt's continuations (token ids, none empty) -> a list of Scores for each prompt.

    start is the State of one sequence before each prompt (None: zeros). Log-probabilities are summed in float64. Raises
    UserError if one is not finite.
    """
    logits, state = prefill(model, prompts, start)
    owner = [number for number, texts in enumerate(continuations) for _ in texts]
    flat = [tokens for texts in continuations for tokens in texts]
    rows = torch.tensor(owner, device=logits.device)
    first = token_scores(logits[rows], torch.tensor([tokens[0] for tokens in flat], device=logits.device))
    scores = [[pair] for pair in first]
    longer = [number for number, tokens in enumerate(flat) if len(tokens) > 1]
    if longer:
        after_prompts = state.selected(rows[torch.tensor(longer, device=logits.device)])
        read, targets = [flat[number][:-1] for number in longer], [flat[number][1:] for number in longer]
        for number, pairs in zip(longer, read_and_score(model, read, targets, after_prompts)):
            scores[number] += pairs
    if not all(math.isfinite(logprob) for pairs in scores for logprob, _ in pairs):
        raise UserError(
            "the model's log-probabilities are NaN or infinite: its weights are damaged, or too large for their dtype "
            "(try --precision fp32)"
        )
    found = iter([Score(sum(logprob for logprob, _ in pairs), all(greedy for _, greedy in pairs)) for pairs in scores])
    return [list(islice(found, len(texts))) for texts in continuations]


def token_scores(logits: torch.Tensor, tokens: torch.Tensor) -> Pairs:
    """Score one token a row: logits (n, V), tokens (n,) -> n pairs. The log-softmax is float64."""
    logprobs = F.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0]
    return list(zip(logprobs.tolist(), (logits.argmax(-1) == tokens).tolist()))


def read_and_score(model: Any, read: Sequence[list[int]], targets: Sequence[list[int]], state: State) -> list[Pairs]:
    """Read token ids after each sequence of state, and score the target that should follow each of them -> the pairs of
    each sequence. About PREFILL tokens are read in a pass; state is overwritten."""
    width = max(PREFILL // len(read), 1)
    found: list[Pairs] = [[] for _ in read]
    for first in range(0, max(map(len, read)), width):
        reading = [i for i, tokens in enumerate(read) if len(tokens) > first]
        rows = torch.tensor(reading, device=state[0].wkv.device)
        pieces, following = ([lists[i][first : first + width] for i in reading] for lists in (read, targets))
        pairs, after = score_packed(model, pieces, following, state.selected(rows))
        state = state.put(rows, after)
        for i, piece in zip(reading, pieces):
            found[i] += islice(pairs, len(piece))
    return found


def score_packed(
    model: Any, read: Sequence[list[int]], targets: Sequence[list[int]], state: State
) -> tuple[Iterator[tuple[float, bool]], State]:
    """Do the same in one pass over a packed row -> an iterator over all pairs, and the State after the tokens read."""
    device = state[0].wkv.device
    tokens = torch.tensor([token for piece in read for token in piece], device=device)
    right = torch.tensor([token for piece in targets for token in piece], device=device)
    ends = torch.tensor([len(piece) for piece in read], device=device).cumsum(0)

    def head(x: torch.Tensor, weight: torch.Tensor) -> Pairs:
        pieces = zip(x[0].split(PIECE), right.split(PIECE))  # (n, C), (n,)
        return [pair for piece, due in pieces for pair in token_scores(product(piece, weight), due)]

    pairs, after = model(tokens[None], state, cu_seqlens=F.pad(ends, (1, 0)), head=head)
    return iter(pairs), after


def score_pairs(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], batch: int, start: State | None = None
) -> Iterator[tuple[int, Score]]:
    """Yield (number, Score) of each pair of a context and a continuation (token ids), about `batch` pairs at a time.

    A context is not empty; an empty continuation has probability 1. start is the State of one sequence before each
    context (None: zeros). Raises UserError as score does.
    """
    behind: dict[Context, list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if continuation:
            behind.setdefault(tuple(context), []).append(number)
        else:
            yield number, Score(0.0, True)
    for together in batches(behind, batch):
        prefix = shared_prefix(list(together))
        begun = prefill(model, [prefix], start)[1] if prefix else start
        rests = [list(context[len(prefix) :]) for context in together]
        texts = [[pairs[number][1] for number in numbers] for numbers in together.values()]
        for numbers, scores in zip(together.values(), score(model, rests, texts, begun)):
            yield from zip(numbers, scores)


def batches(behind: Mapping[Context, list[int]], size: int) -> Iterator[dict[Context, list[int]]]:
    """Split {context: numbers of its continuations} into batches of about `size` numbers. Contexts with a common prefix
    are batched together if there are at least `size` of them, and the rest by length."""
    alike = Counter(context[:PREFIX] for context in behind if len(context) > PREFIX)

    def prefix(context: Context) -> Context:
        return context[:PREFIX] if alike[context[:PREFIX]] >= size else ()

    most, batch, held, last = max(size, TOGETHER), dict[Context, list[int]](), 0, Context()
    for context in sorted(behind, key=lambda context: (prefix(context), len(context))):
        numbers = behind[context]
        for first in range(0, len(numbers), most):
            piece = numbers[first : first + most]
            if batch and (held + len(piece) > size or prefix(context) != last):
                yield batch
                batch, held = {}, 0
            batch[context], held, last = piece, held + len(piece), prefix(context)
    if batch:
        yield batch


def shared_prefix(contexts: Sequence[Context]) -> list[int]:
    """The tokens that all contexts begin with, short of each one's last; [] if fewer than PREFIX, or for one
    context."""
    if len(contexts) < 2:
        return []
    shared = os.path.commonprefix(list(contexts))[: min(map(len, contexts)) - 1]
    return list(shared) if len(shared) >= PREFIX else []
