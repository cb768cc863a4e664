"""A request to the engine: a prompt that a voice continues, and who hears the answers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .known import Read
from .settings import Sampling
from .voices import Voice


class Odds(NamedTuple):
    """The log-probability of a token as the model gives it, before penalties and temperature, and the most probable
    tokens with theirs. With a sampling that is `measured`, and no number of most probable tokens asked for: at its
    temperature, and with the entropy of the distribution in nats."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    entropy: float = 0.0


class Held(Protocol):
    """A form that an answer is held to."""

    def allowed(self) -> torch.Tensor:
        """The tokens that may be drawn next: (V,) bool, at least one."""
        ...

    def take(self, token: int) -> bool:
        """Hear of the token that was drawn -> whether the form can still be held to."""
        ...


class Listener(Protocol):
    """Who asked for an answer."""

    def over(self) -> str:
        """A reason to end the answer now, such as a client that went away, or ""."""
        ...

    def draw(self, token: int, odds: Odds | None) -> str:
        """Hear of the next token -> a reason to end with it, or ""."""
        ...

    def finish(self, end: str) -> None:
        """Hear why the answer ended: a reason of the listener's own, "length", DAMAGED or LOST."""
        ...


@dataclass(eq=False)
class Answer:
    """One answer to a request. Its draws depend on the sampling's seed alone, unless `draws` has their random numbers.
    odds: how many of the most probable tokens its listener hears of with each token; None if it hears of no
    log-probabilities but those that a sampling measures. held: the form of the answer, None for any."""

    sampling: Sampling
    max_tokens: int
    listener: Listener
    odds: int | None = None
    held: Held | None = None
    draws: random.Random | None = None


@dataclass(eq=False)
class Request:
    """A prompt (tokens, at least one) that is read once, and its answers. The state after each of `marks` tokens of the
    prompt is kept, because other prompts may begin like it; `known` tokens of it need not be read, and `read` is what
    is known of it, for the engine itself. scored, if given, hears of the Odds of each token of the prompt but the
    first, with `top` most probable ones."""

    voice: Voice
    tokens: list[int]
    answers: list[Answer]
    marks: Sequence[int] = ()
    known: int = 0
    scored: Callable[[Odds], object] | None = None
    top: int = 0
    read: Read | None = None
