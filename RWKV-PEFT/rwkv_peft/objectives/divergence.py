"""The divergence of a student's next token from its teacher's, with the gradient, in chunks of tokens.

Forward KL covers all of the teacher's modes; reverse KL seeks the largest; the generalized Jensen-Shannon divergence of
GKD (Agarwal et al. 2024, arXiv 2306.13649, equation 1) lies between: beta KL(teacher | m) + (1 - beta)
KL(student | m) with m = beta teacher + (1 - beta) student. Both distributions are softmax(logits / temperature), and
the divergence is times temperature², so that its gradient stays as large at any temperature (Hinton et al. 2015, arXiv
1503.02531).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.cross_entropy import cross_entropy_
from ..ops.products import linear
from .cross_entropy import L2WRAP, ChunkedHead, chunk_rows, divisors

ALIVE = 8  # tensors of a chunk's logits that are alive at once, so that a chunk has so many times fewer tokens


class Divergence(NamedTuple):
    """Settings of a divergence: kind ("forward", "reverse" or "jsd"), beta of the last, temperature; and its weight in
    the loss. beside: the weight of the next token's cross-entropy, 1 - weight if it is None."""

    kind: str
    beta: float
    temperature: float
    weight: float
    beside: float | None = None

    @property
    def nll(self) -> float:
        """The weight of the next token's cross-entropy."""
        return 1 - self.weight if self.beside is None else self.beside


def divergence(student: Tensor, teacher: Tensor, settings: Divergence) -> tuple[Tensor, Tensor]:
    """Logits (n, V) of both -> the divergence of each token (n,), its gradient in the student's logits (n, V); float32,
    or float64 for float64 logits."""
    wide, temperature = torch.promote_types(student.dtype, torch.float32), settings.temperature
    log_p = (student.to(wide) / temperature).log_softmax(1)
    values, gradient = of_logprobs(log_p, (teacher.to(wide) / temperature).log_softmax(1), settings)
    return values * temperature**2, gradient.mul_(temperature)


def of_logprobs(log_p: Tensor, log_q: Tensor, settings: Divergence) -> tuple[Tensor, Tensor]:
    """log-probabilities (n, V) of student and teacher, which are overwritten -> the divergence of each token (n,), its
    gradient in the student's logits (n, V), log_p being their log_softmax."""
    if settings.kind == "forward":
        q = log_q.exp()
        values = (q * log_q.sub_(log_p)).sum(1)
        return values, log_p.exp_().sub_(q)
    p = log_p.exp()
    if settings.kind == "reverse":
        slope = log_p.sub_(log_q)
        values = (p * slope).sum(1)
    else:
        beta = settings.beta
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        of_teacher = (log_q.exp() * log_q.sub_(log_m)).sum(1)
        slope = log_p.sub_(log_m).mul_(1 - beta)
        values = beta * of_teacher + (p * slope).sum(1)
    return values, slope.sub_((p * slope).sum(1, keepdim=True)).mul_(p)


def linear_divergence(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    targets: Tensor,
    counted: Tensor,
    count: float | Tensor,
    settings: Divergence,
    weights: Tensor | None = None,
    parts: Tensor | None = None,
) -> Tensor:
    """Sums over the counted tokens, each times its weight, divided by `count`: the loss, the divergence, the
    cross-entropy of the next token, and the share of each of `parts` in this: (3,) or (3 + k,); only the first has a
    gradient.

    student: hidden (B, T, C) and the weight of its head (V, C); teacher: hidden (n, D) of the counted tokens alone, and
    the weight of its head (V, D); the others as in linear_cross_entropy, and so is the
    gradient of the cross-entropy's share, L2Wrap included.
    """
    hidden, weight = student
    targets = targets.reshape(-1)[counted]
    weights = None if weights is None else weights.reshape(-1)[counted]
    count, after = divisors(hidden, count)

    def rule(logits: Tensor, part: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
        own, marks = (None if each is None else each[..., part] for each in (weights, parts))
        losses, grad = of_logits(
            logits, linear(teacher[0][part], teacher[1]), targets[part], count, settings, own, marks
        )
        return losses, grad.to(logits.dtype)

    sums, size = 3 + (0 if parts is None else len(parts)), taught_rows(weight.shape[0], weight.is_cuda)
    return ChunkedHead.apply(hidden, weight, counted, size, sums, rule) / after


def taught_rows(vocabulary: int, on_gpu: bool) -> int:
    """The number of tokens in a chunk of logits of both."""
    return max(1, chunk_rows(vocabulary, on_gpu) // ALIVE)


def of_logits(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    count: float | Tensor,
    settings: Divergence,
    weights: Tensor | None = None,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Student and teacher as in divergence -> the sums of linear_divergence (3,), with `parts` (3 + k,), the first
    one's gradient (n, V)."""
    mixes, share = settings.nll > 0, settings.nll / count
    nll, pull = cross_entropy_(student.clone(), targets, share, L2WRAP, gradient=mixes, each=True)
    apart, gradient = divergence(student, teacher, settings)
    gradient.mul_(settings.weight / count)
    if pull is not None:
        gradient += pull
    if weights is not None:
        apart, nll = apart * weights, nll * weights
        gradient.mul_(weights[:, None])
    total = torch.stack([apart.sum() / count, nll.sum() / count])
    loss = settings.weight * total[0] + settings.nll * total[1]
    of_parts = [] if parts is None else [(nll * parts).sum(1) / count]
    return torch.cat([loss[None], total, *of_parts]), gradient


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

    return ChunkedHead.apply(hidden, weight, counted, taught_rows(weight.shape[0], weight.is_cuda), 1, rule)[0]
