"""Requests to the engine, and the cache of prefixes that they may have in common."""

import random
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..models.state import State
from .settings import Sampling
from .speakers import Speaker


class Logprobs(NamedTuple):
    """A token's log-probability and the most probable tokens with theirs, before penalties and temperature. With a
    `measured` sampling and no most probable tokens: at its temperature, with the distribution's entropy in nats."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    entropy: float = 0.0


class Constraint(Protocol):
    """A grammar that a completion follows."""

    def allowed(self) -> torch.Tensor | None:
        """The tokens that may come next: (V,) bool, at least one; None for all."""
        ...

    def accept(self, token: int) -> bool:
        """Advance by a token -> False if the grammar can no longer be followed."""
        ...


class Listener(Protocol):
    """The engine's callbacks for one completion."""

    def cancelled(self) -> str:
        """A reason to end the completion now, such as a client that went away, or ""."""
        ...

    def on_token(self, token: int, logprobs: Logprobs | None) -> str:
        """Take the next token -> a reason to end with it, or ""."""
        ...

    def on_end(self, reason: str) -> None:
        """Take the reason for the end: one of the listener's own, "length", DAMAGED or LOST."""
        ...


@dataclass(eq=False)
class Completion:
    """One of the completions of a prompt, sampled with its own seed, or with the random numbers of `draws`.

    The listener gets log-probabilities if the sampling is `measured`, or has a number of top_logprobs."""

    sampling: Sampling
    max_tokens: int
    listener: Listener
    constraint: Constraint | None = None
    draws: random.Random | None = None


class CachedPrefix(NamedTuple):
    """The first `length` tokens of a text, already read: the logits (1, V) and the State after them."""

    length: int
    logits: torch.Tensor
    state: State


@dataclass(eq=False)
class GenerationRequest:
    """A prompt (tokens, at least one), which is read once, and its completions.

    The State after each of `marks` tokens is cached, because other prompts may begin alike. The engine sets `cached`,
    the number of prompt tokens found in its cache, and `prefix`."""

    speaker: Speaker
    tokens: list[int]
    completions: list[Completion]
    marks: Sequence[int] = ()
    cached: int = 0
    prefix: CachedPrefix | None = None


class PrefixCache:
    """The most recently used CachedPrefixes, up to `limit` bytes in all; a Speaker finds those of its identity.

    A State cannot be taken back to an earlier token: a prefix serves texts that begin with all of its tokens.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.prefixes: OrderedDict[tuple[object, bytes], CachedPrefix] = OrderedDict()  # least recently used first

    def longest(self, speaker: Speaker, tokens: Sequence[int]) -> CachedPrefix | None:
        """The longest cached prefix of `tokens`, or None."""
        text = packed(tokens)
        keys = [key for key in self.prefixes if key[0] == speaker.identity and text.startswith(key[1])]
        if not keys:
            return None
        key = max(keys, key=lambda key: len(key[1]))
        self.prefixes.move_to_end(key)
        return self.prefixes[key]

    def add(self, speaker: Speaker, tokens: Sequence[int], logits: torch.Tensor, state: State) -> None:
        """Cache the logits (1, V) and the State of one sequence after tokens; neither is written to afterwards."""
        self.put((speaker.identity, packed(tokens)), CachedPrefix(len(tokens), logits, state))

    def put(self, key: tuple[object, bytes], prefix: CachedPrefix) -> None:
        """Cache a prefix by a speaker's identity and its `packed` tokens."""
        self._remove(key)
        self.prefixes[key] = prefix
        self.size += cached_bytes(key, self.prefixes[key])
        while self.size > self.limit:
            self._remove(next(iter(self.prefixes)))

    def _remove(self, key: tuple[object, bytes]) -> None:
        if key in self.prefixes:
            self.size -= cached_bytes(key, self.prefixes.pop(key))


def packed(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes, four for each, so that prefixes are compared at once."""
    return array("I", tokens).tobytes()


def cached_bytes(key: tuple[object, bytes], prefix: CachedPrefix) -> int:
    return len(key[1]) + prefix.logits.nbytes + prefix.state.nbytes
