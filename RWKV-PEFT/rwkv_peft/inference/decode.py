"""Continue many prompts at once: each gets the tokens that it would get alone, up to rounding."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..checkpoints.tensors import dtype_name
from ..cli.errors import UserError
from ..models.parts import LanguageModel
from ..models.state import State
from .batch import DAMAGED
from .engine import Engine
from .loading import Subject
from .requests import Completion, GenerationRequest, Logprobs
from .settings import Sampling
from .speakers import Speaker
from .text import Continuation


class GeneratedToken(NamedTuple):
    """A token sampled for the prompt of this number; end is "" or the reason for which the sequence ends with it:
    "length", or one from `ends`.

    With a `measured` sampling, the token's log-probability and the distribution's entropy in nats, at its temperature
    and before top-k and top-p; with top_logprobs as in Logprobs."""

    number: int
    token: int
    end: str
    logprob: float = 0.0
    entropy: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class TokenCollector:
    """The listener for one prompt, which appends to the GeneratedTokens of all; a longest of 0 is no limit."""

    def __init__(
        self, number: int, found: deque[GeneratedToken], ends: Callable[[int, int], str] | None, longest: int
    ) -> None:
        self.number, self.found, self.ends, self.left = number, found, ends, longest
        self.length, self.damaged = 0, False

    def cancelled(self) -> str:
        return ""

    def on_token(self, token: int, logprobs: Logprobs | None) -> str:
        self.length, self.left = self.length + 1, self.left - 1
        end = (self.ends(self.number, token) if self.ends else "") or ("" if self.left else "length")
        measures = (logprobs.logprob, logprobs.entropy, logprobs.top) if logprobs else ()
        self.found.append(GeneratedToken(self.number, token, end, *measures))
        return end

    def on_end(self, reason: str) -> None:
        self.damaged = reason == DAMAGED


def generate(
    model: LanguageModel,
    prompts: Sequence[list[int]] | Mapping[int, list[int]],
    sampling: Sampling = Sampling(),
    max_tokens: int = 256,
    ends: Callable[[int, int], str] | None = None,
    start: State | None = None,
    batch: int = 32,
    vocab_size: int | None = None,
) -> Iterator[GeneratedToken]:
    """Continue prompts (lists of token ids, none empty), numbered by their place, or {number: prompt}; yield each
    GeneratedToken as it is sampled.

    ends(number, token) -> "" or a reason to end that sequence there. start is the State of one sequence before each
    prompt (None: zeros). At most `batch` sequences advance at a time, and tokens from vocab_size on are never sampled.
    A prompt that is the same list as the one before it is read once for both.

    The tokens of a prompt depend only on it, its number, `start` and `sampling`, up to rounding; with weights in blocks
    the rounding of activations may depend on the batch. Raises UserError for an empty prompt, and, once the other
    prompts have ended, for one with logits that are not finite.
    """
    numbered = list(prompts.items() if isinstance(prompts, Mapping) else enumerate(prompts))
    for number, prompt in numbered:
        if not prompt:
            raise UserError(f"prompt {number} holds no token; a model continues at least one")
    if max_tokens < 1 or not numbered:
        return
    found = deque[GeneratedToken]()
    listeners = [TokenCollector(number, found, ends, max_tokens) for number, _ in numbered]
    vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    engine = Engine(vocab_size, min(batch, len(numbered)), overlap=model.emb.weight.is_cuda)
    speaker = Speaker("", model, start)
    waiting = deque[GenerationRequest]()
    for listener, (number, prompt) in zip(listeners, numbered):
        if not waiting or waiting[-1].tokens is not prompt:
            waiting.append(GenerationRequest(speaker, prompt, []))
        waiting[-1].completions.append(Completion(sampling.seeded(number), max_tokens, listener))
    while waiting or engine.busy:
        while waiting and len(engine.waiting) < batch:
            engine.add(waiting.popleft())
        engine.step()
        while found:
            yield found.popleft()
    if damaged := [listener for listener in listeners if listener.damaged]:
        raise damaged_error(model, damaged[0].number, damaged[0].length, len(damaged) - 1)


def damaged_error(model: LanguageModel, number: int, length: int, more: int = 0) -> UserError:
    """The UserError for a prompt with logits that are not finite after `length` tokens, and `more` prompts like it."""
    others = f" (and {more} more)" if more else ""
    return UserError(
        f"the model's logits are NaN or Inf for prompt {number} after {length} tokens{others}: its weights are "
        f"damaged, or too large for {dtype_name(model.emb.weight.dtype)} (try --precision fp32)"
    )


def complete(
    subject: Subject,
    prompts: Sequence[list[int]],
    continuations: Sequence[Continuation],
    sampling: Sampling,
    max_tokens: int,
    batch: int,
) -> Iterator[int]:
    """Continue prompts (lists of token ids), `batch` at a time, and feed each Continuation; yield the number of each as
    it ends: at one of its stops, at the end of the document, or after max_tokens."""
    model, start, tokenizer = subject

    def ends(number: int, token: int) -> str:
        return continuations[number].feed(token)

    for step in generate(model, prompts, sampling, max_tokens, ends, start, batch, tokenizer.vocab_size):
        if step.end:
            continuations[step.number].finish(step.end)
            yield step.number
    for number in range(len(prompts) if max_tokens == 0 else 0):
        continuations[number].finish("length")
        yield number
