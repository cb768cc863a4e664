"""Continue many prompts at once, with the engine: each gets the tokens that it would get alone, up to rounding."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..checkpoints.tensors import dtype_name
from ..cli.errors import UserError
from ..models.parts import LanguageModel
from ..models.state import State
from .asked import Answer, Odds, Request
from .engine import Engine
from .rows import DAMAGED
from .settings import Sampling
from .voices import Voice


class Step(NamedTuple):
    """A token drawn for the prompt of this number; end is "" while its sequence goes on, else the reason why it ends
    with this token: "length", or the one that `ends` gave. If the sampling is `measured`, the token's log-probability
    and the entropy of the distribution, in nats, at the sampling's temperature and before top-k and top-p."""

    number: int
    token: int
    end: str
    logprob: float = 0.0
    entropy: float = 0.0


class Heard:
    """The listener of a prompt's answer, which adds its Steps to those of all prompts; a longest of 0 is no limit."""

    def __init__(self, number: int, steps: deque[Step], ends: Callable[[int, int], str] | None, longest: int) -> None:
        self.number, self.steps, self.ends, self.left = number, steps, ends, longest
        self.length, self.damaged = 0, False

    def over(self) -> str:
        return ""

    def draw(self, token: int, odds: Odds | None) -> str:
        self.length, self.left = self.length + 1, self.left - 1
        end = (self.ends(self.number, token) if self.ends else "") or ("" if self.left else "length")
        measures = (odds.logprob, odds.entropy) if odds else ()
        self.steps.append(Step(self.number, token, end, *measures))
        return end

    def finish(self, end: str) -> None:
        self.damaged = end == DAMAGED


def generate(
    model: LanguageModel,
    prompts: Sequence[list[int]] | Mapping[int, list[int]],
    sampling: Sampling = Sampling(),
    max_tokens: int = 256,
    ends: Callable[[int, int], str] | None = None,
    start: State | None = None,
    batch: int = 32,
    vocab_size: int | None = None,
) -> Iterator[Step]:
    """Continue prompts (lists of token ids, none empty), numbered by their place, or {number: prompt}; yield a Step for
    each token as it is drawn. A prompt that is the same list as the one before it is read once for both.

    ends(number, token) -> "" or a reason to end that sequence there; start is the State of one sequence before each
    prompt (None: zeros); at most `batch` sequences advance at a time; tokens from vocab_size on are never drawn.
    The tokens of a prompt depend only on it, its number, `start` and `sampling`, up to rounding, not on the other
    prompts; with weights in blocks the rounding of activations may make them differ. Raises UserError for an empty
    prompt, and, once the other prompts have ended, for one after which the model's logits are not finite.
    """
    numbered = list(prompts.items() if isinstance(prompts, Mapping) else enumerate(prompts))
    for number, prompt in numbered:
        if not prompt:
            raise UserError(f"prompt {number} holds no token; a model continues at least one")
    if max_tokens < 1 or not numbered:
        return
    steps = deque[Step]()
    listeners = [Heard(number, steps, ends, max_tokens) for number, _ in numbered]
    vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    engine = Engine(vocab_size, min(batch, len(numbered)), ahead=model.emb.weight.is_cuda)
    voice = Voice("", model, start)
    waiting = deque[Request]()
    for listener, (number, prompt) in zip(listeners, numbered):
        if not waiting or waiting[-1].tokens is not prompt:
            waiting.append(Request(voice, prompt, []))
        waiting[-1].answers.append(Answer(sampling.seeded(number), max_tokens, listener))
    while waiting or engine.busy:
        while waiting and len(engine.waiting) < batch:
            engine.add(waiting.popleft())
        engine.step()
        while steps:
            yield steps.popleft()
    if damaged := [listener for listener in listeners if listener.damaged]:
        raise refuse_damaged(model, damaged[0].number, damaged[0].length, len(damaged) - 1)


def refuse_damaged(model: LanguageModel, number: int, length: int, more: int = 0) -> UserError:
    """Make the UserError about a prompt after so many drawn tokens, and `more` prompts like it."""
    others = f" (and {more} more)" if more else ""
    return UserError(
        f"the model's logits are NaN or Inf for prompt {number} after {length} tokens{others}: its weights are "
        f"damaged, or too large for {dtype_name(model.emb.weight.dtype)} (try --precision fp32)"
    )
