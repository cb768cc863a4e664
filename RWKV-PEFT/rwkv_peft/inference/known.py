"""Keep the states after texts that were read, so that a text which begins like one of them is read from there on."""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from ..models.state import State


class Read(NamedTuple):
    """The first tokens of a text that are read: how many, the logits (1, V) after them, and their State."""

    length: int
    logits: torch.Tensor
    state: State


class Known:
    """The most recently used Reads, up to `limit` bytes in all; an owner (a Voice) finds only its own.

    A state cannot be taken back to an earlier token: a Read serves texts that begin with all of its tokens.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.reads: OrderedDict[tuple[Hashable, bytes], Read] = OrderedDict()  # the least recently used first

    def longest(self, owner: Hashable, tokens: Sequence[int]) -> Read | None:
        """The Read of most tokens with which `tokens` begin, None if none is known."""
        text = packed(tokens)
        keys = [key for key in self.reads if key[0] is owner and text.startswith(key[1])]
        if not keys:
            return None
        key = max(keys, key=lambda key: len(key[1]))
        self.reads.move_to_end(key)
        return self.reads[key]

    def add(self, owner: Hashable, tokens: Sequence[int], logits: torch.Tensor, state: State) -> None:
        """Keep the logits (1, V) and the State of one sequence after tokens; neither is written to afterwards."""
        key = owner, packed(tokens)
        self._remove(key)
        self.reads[key] = Read(len(tokens), logits, state)
        self.size += bytes_of(key, self.reads[key])
        while self.size > self.limit:
            self._remove(next(iter(self.reads)))

    def forget(self, owner: Hashable) -> None:
        """Drop all that an owner had read."""
        for key in [key for key in self.reads if key[0] is owner]:
            self._remove(key)

    def _remove(self, key: tuple[Hashable, bytes]) -> None:
        if key in self.reads:
            self.size -= bytes_of(key, self.reads.pop(key))


def packed(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes, four for each, which are compared at once."""
    return array("I", tokens).tobytes()


def bytes_of(key: tuple[Hashable, bytes], read: Read) -> int:
    return len(key[1]) + read.logits.nbytes + read.state.nbytes
