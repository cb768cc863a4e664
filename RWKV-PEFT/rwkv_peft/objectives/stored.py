"""A teacher's word on the next token as it is stored: its most probable tokens, and all others as one class."""

from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """words (n, k): the k most probable tokens at n places; logprobs (n, k + 1): their log-probabilities, and behind
    them that of all other tokens together."""

    words: Tensor
    logprobs: Tensor

    def part(self, part: slice) -> "Stored":
        return Stored(self.words[part], self.logprobs[part])


def most_probable(logits: Tensor, number: int, temperature: float) -> Stored:
    """logits (n, V) -> the Stored of so many tokens, below V, of softmax(logits / temperature)."""
    log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(1)
    words = log_p.topk(number, 1).indices
    return Stored(words, in_classes(log_p, words))


def in_classes(log_p: Tensor, words: Tensor) -> Tensor:
    """log-probabilities (n, V) -> those of the words (n, k), and of all others together: (n, k + 1)."""
    others = log_p.scatter(1, words, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, words), others], 1)
