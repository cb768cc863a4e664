"""Turn the requests of the lm-evaluation-harness into tokens, and answer them, without the package lm_eval itself."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..data.tokenizer import Tokenizer
from ..errors import UserError, quoted
from ..generate.loading import Subject
from ..generate.prompts import encode
from ..generate.settings import Sampling
from .asking import GREEDY, write
from .scoring import score_pairs

SCORED, ROLLING, WRITTEN = "loglikelihood", "loglikelihood_rolling", "generate_until"  # lm_eval's kinds of requests
MAX_TOKENS = 256  # lm_eval's default for a task that names no length
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
SAMPLES = ("do_sample", "temperature", "top_p", "top_k")
NEUTRAL = (("num_beams", 1),)  # settings that change nothing here

Answer = tuple[float, bool] | float | str  # to SCORED, ROLLING, WRITTEN


class Question(NamedTuple):
    """A request in tokens.

    context (token ids, not empty) is read first. A scored request has the continuation (token ids) whose probability is
    asked; a written one has the sampling, the length in tokens at most, and the texts that end the answer.
    """

    context: list[int]
    continuation: list[int]
    sampling: Sampling = GREEDY
    length: int = 0
    stops: tuple[str, ...] = ()


def question(kind: str, arguments: Sequence[Any], tokenizer: Tokenizer, number: int) -> Question:
    """Make the Question of lm_eval's request of a kind with these arguments. Raises UserError for arguments that are no
    text or settings that are not offered, and for an empty context if no token of the tokenizer starts a document."""
    texts = arguments[:1] if kind == WRITTEN else arguments
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"a task asks about {quoted(wrong[0])}, and a text is due (doc_to_text, doc_to_target)")
    if kind == SCORED:
        return Question(*in_two(tokenizer, *arguments))
    if kind == ROLLING:
        return Question(encode(tokenizer, "", number), tokenizer.encode(arguments[0]))
    context, settings = arguments
    return Question(encode(tokenizer, context, number), [], *manner(settings), stops_of_request(settings))


def in_two(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a context and its continuation as lm_eval does -> the tokens of each.

    Space at the end of the context belongs to the continuation, and an empty context is the token that starts a
    document. Unlike in lm_eval, if a token of the whole text crosses the border, each part is encoded by itself, so
    that both are read in full.
    """
    text = context.rstrip()
    continuation = context[len(text) :] + continuation
    before, whole = tokenizer.encode(text), tokenizer.encode(text + continuation)
    if whole[: len(before)] != before:
        return before, tokenizer.encode(continuation)
    return before or encode(tokenizer, "", 0), whole[len(before) :]


def manner(settings: Mapping[str, Any]) -> tuple[Sampling, int]:
    """Read from a task's settings how its answers are written -> (Sampling, the length in tokens at most). They are
    greedy unless the task names a temperature above 0 and does not say do_sample: false. Raises UserError for settings
    that are not offered."""
    for name, value in settings.items():
        if name not in ("until", *LENGTHS, *SAMPLES) and (name, value) not in NEUTRAL:
            raise UserError(f"a task asks for {name} {value!r} in its generation_kwargs, which is not offered here")
    length = next((int(settings[name]) for name in LENGTHS if settings.get(name) is not None), MAX_TOKENS)
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0) or temperature == 0:
        return GREEDY, length
    top_p, top_k = settings.get("top_p", 1.0), settings.get("top_k", 0)
    return Sampling(temperature=temperature, top_p=float(top_p), top_k=int(top_k)), length


def stops_of_request(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that end an answer. An empty one is left out, because it would end the answer before it began. Raises
    UserError for anything but texts."""
    until = settings.get("until") or ()
    if not (isinstance(until, str) or isinstance(until, list) and all(isinstance(text, str) for text in until)):
        raise UserError(f"a task's answers end at {quoted(until)} (until), and a text is due, or a list of texts")
    return tuple(filter(None, [until] if isinstance(until, str) else until))


def answers(subject: Subject, kind: str, questions: Sequence[Question], batch: int) -> Iterator[tuple[int, Answer]]:
    """Yield (place, answer) of each Question of one kind as it is found, about `batch` sequences at a time.

    In a batch that is scored, a context with several continuations is read once, and so is a long opening that all
    contexts share. No text is cut, because a state holds any length.
    """
    if kind != WRITTEN:
        pairs = [(question.context, question.continuation) for question in questions]
        for place, score in score_pairs(subject.model, pairs, batch, subject.start):
            yield place, score.logprob if kind == ROLLING else (score.logprob, score.greedy)
        return
    alike: dict[tuple[Sampling, int], list[int]] = {}
    for place, question in enumerate(questions):
        alike.setdefault((question.sampling, question.length), []).append(place)
    for (sampling, length), places in alike.items():
        contexts, stops = zip(*((questions[place].context, questions[place].stops) for place in places))
        for number, answer in write(subject, contexts, stops, sampling, length, batch):
            yield places[number], answer.text


def share(questions: Sequence[Question], rank: int, ranks: int) -> list[int]:
    """The places of the Questions that one of several ranks answers. Questions with the same context stay together."""
    contexts: dict[tuple[int, ...], int] = {}
    of = [contexts.setdefault(tuple(question.context), len(contexts)) for question in questions]
    return [place for place, context in enumerate(of) if context % ranks == rank]
