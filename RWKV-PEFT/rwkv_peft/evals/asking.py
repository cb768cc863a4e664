"""Put questions to a model: it writes answers, or scores continuations by their log-probabilities. A prompt or a long
opening that several share is read once."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..cli.errors import UserError
from ..inference.continuation import Continuation, complete
from ..inference.loading import Subject
from ..inference.prompts import encode
from ..inference.reading import PREFILL, prefill
from ..inference.settings import Sampling
from ..models.state import State
from ..ops.decode import product
from .records import Record
from .rows import Choices, Problem, Score, Task, stops_of_prompt

GREEDY = Sampling(temperature=0)
PIECE = 256  # tokens whose logits are formed at a time
OPENING = 64  # contexts count as beginning alike if this many tokens agree, as with the same examples before a question
TOGETHER = 16  # continuations of one context that are scored at once even if the batch is smaller
Context = tuple[int, ...]


def ask(
    task: Task, subject: Subject, problems: Mapping[int, Problem], batch: int, max_tokens: int, stop: Sequence[str] = ()
) -> Iterator[Record]:
    """Yield the Record of each problem, {number: Problem}, as it is done, `batch` at a time. Written answers have at
    most max_tokens, and end at a text of `stop` or of their layout."""
    prompts = {number: encode(subject.tokenizer, problem.prompt, number) for number, problem in problems.items()}
    if isinstance(task, Choices):
        found = score_choices(task, subject, problems, prompts, batch)
    else:
        numbers, texts = list(problems), [problem.answer for problem in problems.values()]
        stops = [(*stops_of_prompt(problem.prompt), *stop) for problem in problems.values()]
        answers = write(subject, [prompts[n] for n in numbers], stops, GREEDY, max_tokens, batch)
        found = (
            (numbers[n], {"generated": answer.text, "end": answer.end} | task.judge(answer.text, texts[n]))
            for n, answer in answers
        )
    for number, told in found:
        yield {"number": number, "prompt": problems[number].prompt, "answer": problems[number].answer, **told}


def write(
    subject: Subject,
    prompts: Sequence[list[int]],
    stops: Sequence[tuple[str, ...]],
    sampling: Sampling,
    max_tokens: int,
    batch: int,
) -> Iterator[tuple[int, Continuation]]:
    """Continue prompts (lists of token ids), `batch` at a time; yield (place, Continuation) of each as it ends: at one
    of its stops, at the end of the document, or after max_tokens."""
    answers = [Continuation({}, subject.tokenizer, texts) for texts in stops]
    for place in complete(subject, prompts, answers, sampling, max_tokens, batch):
        yield place, answers[place]


def score_choices(
    task: Choices, subject: Subject, problems: Mapping[int, Problem], prompts: Mapping[int, list[int]], batch: int
) -> Iterator[tuple[int, Record]]:
    """Yield (number, the log-probabilities and their judgement) of each problem, `batch` problems at a time, those of
    similar length together."""
    order = sorted(problems, key=lambda number: len(prompts[number]))
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        texts = [[subject.tokenizer.encode(text) for text in problems[number].continuations] for number in numbers]
        scored = score(subject.model, [prompts[number] for number in numbers], texts, subject.start)
        for number, scores in zip(numbers, scored):
            yield number, {"logprobs": [score.logprob for score in scores]} | task.judge(scores, problems[number])


@torch.inference_mode()
def score(
    model: Any, prompts: Sequence[list[int]], continuations: Sequence[Sequence[list[int]]], start: State | None = None
) -> list[list[Score]]:
    """Score, for each prompt (a list of token ids, not empty), each of its continuations (lists of token ids, not
    empty); start is the State of one sequence before each prompt (None: zeros). Log-probabilities are summed in
    float64. Raises UserError if one is not finite."""
    logits, state = prefill(model, prompts, start)
    owner = [number for number, texts in enumerate(continuations) for _ in texts]
    flat = [tokens for texts in continuations for tokens in texts]
    rows = torch.tensor(owner, device=logits.device)
    first = token_scores(logits[rows], torch.tensor([tokens[0] for tokens in flat], device=logits.device))
    scores = [[pair] for pair in zip(*(values.tolist() for values in first))]
    longer = [number for number, tokens in enumerate(flat) if len(tokens) > 1]
    if longer:
        places = torch.tensor(longer, device=logits.device)
        read, due = [flat[number][:-1] for number in longer], [flat[number][1:] for number in longer]
        values = read_and_score(model, read, due, state.selected(rows[places]))
        for number, pairs in zip(longer, values):
            scores[number] += pairs
    if not all(math.isfinite(logprob) for pairs in scores for logprob, _ in pairs):
        raise UserError(
            "the model's log-probabilities are NaN or infinite: its weights are damaged, or too large for their dtype "
            "(try --precision fp32)"
        )
    found = iter([Score(sum(logprob for logprob, _ in pairs), all(greedy for _, greedy in pairs)) for pairs in scores])
    return [[next(found) for _ in texts] for texts in continuations]


def token_scores(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score one token a row: logits (n, V), tokens (n,) -> log-probabilities (n,) float64, and a mask (n,), True if the
    token is the most probable one."""
    logprobs = F.log_softmax(logits.double(), -1)
    return logprobs.gather(1, tokens[:, None])[:, 0], logits.argmax(-1) == tokens


def read_and_score(
    model: Any, read: Sequence[list[int]], due: Sequence[list[int]], state: State
) -> list[list[tuple[float, bool]]]:
    """Read a list of tokens after each sequence of state, and score the tokens of due, one for each token that is read:
    the token that should follow it. About PREFILL tokens are read in a pass; state is overwritten.

    -> for each sequence, (log-probability, True if it is the most probable) of each token of due.
    """
    width = max(PREFILL // len(read), 1)
    found: list[list[tuple[float, bool]]] = [[] for _ in read]
    for first in range(0, max(map(len, read)), width):
        reading = [i for i, tokens in enumerate(read) if len(tokens) > first]
        rows = torch.tensor(reading, device=state[0].wkv.device)
        pieces, following = ([lists[i][first : first + width] for i in reading] for lists in (read, due))
        values, after = score_packed(model, pieces, following, state.selected(rows))
        state = state.put(rows, after)
        for i, pairs in zip(reading, values):
            found[i] += pairs
    return found


def score_packed(
    model: Any, read: Sequence[list[int]], due: Sequence[list[int]], state: State
) -> tuple[list[list[tuple[float, bool]]], State]:
    """Do the same as read_and_score in one pass -> the scores, and the State after the tokens that were read."""
    device = state[0].wkv.device
    tokens = torch.tensor([token for piece in read for token in piece], device=device)
    targets = torch.tensor([token for piece in due for token in piece], device=device)
    ends = torch.tensor([len(piece) for piece in read], device=device).cumsum(0)

    def head(x: torch.Tensor, weight: torch.Tensor) -> list[tuple[float, bool]]:
        found = []
        for piece, right in zip(x[0].split(PIECE), targets.split(PIECE)):  # (n, C), (n,)
            logprobs, greedy = token_scores(product(piece, weight), right)
            found += list(zip(logprobs.tolist(), greedy.tolist()))
        return found

    found, after = model(tokens[None], state, cu_seqlens=F.pad(ends, (1, 0)), head=head)
    pairs = iter(found)
    return [[next(pairs) for _ in piece] for piece in due], after


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
