"""The entropy of a model's next token, with its gradient, in chunks of tokens."""

import torch
from torch import Tensor

from .cross_entropy import chunked_head
from .divergence import taught_rows


def linear_entropy(hidden: Tensor, weight: Tensor, counted: Tensor, weights: Tensor) -> Tensor:
    """Sum of the entropies (nats) of the next token at counted positions, each times its weight: (), float32 (float64
    for float64 input).

    hidden (B, T, C), weight (V, C) of the head, counted (n,) as in linear_cross_entropy, weights (n,). An entropy's
    gradient in its logits is -p (log p + entropy).
    """

    def rule(logits: Tensor, part: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(1)
        grad = p.mul_(log_p.add_(entropy[:, None])).mul_(-weights[part, None]) if gradient else None
        return (entropy * weights[part]).sum()[None], None if grad is None else grad.to(logits.dtype)

    return chunked_head(hidden, weight, counted, taught_rows(weight.shape[0], weight.is_cuda), 1, rule)[0]
