"""Sample tokens from logits: penalties, temperature, top-k, top-p, min-p and the draw, as functions over a batch.

Shapes: n sequences, V tokens in the vocabulary, k candidates. Top-p is nucleus sampling (Holtzman et al. 2019,
arXiv 1904.09751), the repetition penalty CTRL's (Keskar et al. 2019, arXiv 1909.05858).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .settings import Sampling

FIRST_CANDIDATES = 64  # top-p looks at this many tokens first, and at more if they do not reach its share
SPAN = 64  # neighbours in the vocabulary of which `largest` first looks at the largest


def sample(logits: torch.Tensor, uniforms: torch.Tensor | Sequence[float], sampling: Sampling) -> torch.Tensor:
    """Sample a token for each row: logits (n, V), one number in [0, 1) for each row -> tokens (n,) int64. Equal rows
    and numbers give equal tokens, whatever else is in the batch."""
    if sampling.temperature == 0:
        return first_largest(logits)
    weights, tokens = candidates(logits, sampling)
    return tokens.gather(-1, pick(weights, uniforms))[:, 0]


def penalize(logits: torch.Tensor, counts: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Apply to logits (n, V) the penalties for counts (n, V), float32, of the tokens generated before."""
    if sampling.repetition_penalty != 1:
        factor = torch.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits = torch.where(counts > 0, logits * factor, logits)
    return logits - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts


def count(counts: torch.Tensor, tokens: torch.Tensor, decay: float) -> None:
    """Age counts (n, V) by a step and add tokens (n,), in place."""
    if decay != 1:
        counts.mul_(decay)
    counts.scatter_add_(1, tokens[:, None], counts.new_ones(len(tokens), 1))


def measure(logits: torch.Tensor, tokens: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The log-probability of each row's token and the entropy (2, n), by logits (n, V) at the sampling's temperature
    and tokens (n,)."""
    if sampling.temperature:
        logits = logits / sampling.temperature
    found = logits.float().log_softmax(-1)
    return torch.stack([found.gather(-1, tokens[:, None])[:, 0], -(found.exp() * found).sum(-1)])


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the tokens to draw from: logits (n, V) -> weights (n, k) float64, proportional to the probabilities, and
    their tokens (n, k) int64.

    A token that top-k, top-p or min-p leaves out has weight 0 or is not among the k.
    """
    logits = logits.float()
    if sampling.temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # no overflow at any temperature
    if sampling.top_k:
        logits, tokens = largest(logits, min(sampling.top_k, logits.shape[-1]))
        weights = logits.softmax(-1).double()
    elif sampling.top_p < 1:
        weights, tokens = most_probable(logits.softmax(-1), sampling.top_p)
    else:
        weights = logits.softmax(-1).double()
        tokens = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
    if sampling.top_p < 1:
        before = weights.cumsum(-1) - weights  # the summed weight of the more probable tokens
        kept = before < sampling.top_p
        kept[:, 0] = True
        weights = weights * kept
    if sampling.min_p:
        weights = weights * (weights >= sampling.min_p * weights.amax(-1, keepdim=True))
    return weights, tokens


def most_probable(probabilities: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens, in order, until they reach `share` in every row of probabilities (n, V) ->
    probabilities (n, k) float64, tokens (n, k).

    On a CPU this usually sorts a small part of a large vocabulary, and more only for rows that need it (others are
    padded with zeros). On a GPU it sorts all, because the host would have to wait for the number that suffices."""
    size = probabilities.shape[-1]
    k = min(FIRST_CANDIDATES, size) if probabilities.is_cpu else size
    found, tokens = largest(probabilities, k)
    found = found.double()
    while k < size and (short := (found.sum(-1) < share).nonzero()[:, 0]).numel():
        k = min(16 * k, size) if k < 1000 else size
        found, tokens = (F.pad(x, (0, k - x.shape[1])) for x in (found, tokens))
        more, tokens[short] = largest(probabilities[short], k)
        found[short] = more.double()
    return found, tokens


def first_largest(x: torch.Tensor) -> torch.Tensor:
    """x.argmax(-1) for x (n, V). On a CPU the spans' maxima come first, which take a quarter of the time."""
    n, size = x.shape
    spans = size // SPAN
    if not x.is_cpu or not spans:
        return x.argmax(-1)
    whole = x[:, : spans * SPAN].unflatten(1, (spans, SPAN))
    span = whole.amax(-1).argmax(-1)
    found = torch.cat([whole[torch.arange(n), span], x[:, spans * SPAN :]], 1).argmax(-1)
    return torch.where(found < SPAN, span, spans - 1) * SPAN + found


def largest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x.topk(k) for x (n, V). On a CPU, the k spans of neighbours with the largest maxima hold the k largest numbers,
    so that only these are searched."""
    n, size = x.shape
    spans = size // SPAN
    if k == size and not x.is_cpu:
        return x.sort(descending=True, stable=True)  # of equal ones the first comes first
    if not x.is_cpu or 4 * k > spans:
        return x.topk(k)
    starts = x[:, : spans * SPAN].unflatten(1, (spans, SPAN)).amax(-1).topk(k).indices * SPAN
    places = (starts[..., None] + torch.arange(SPAN)).view(n, -1)
    rest = torch.arange(spans * SPAN, size).expand(n, -1)
    places = torch.cat([places, rest], -1)
    found, chosen = x.gather(-1, places).topk(k)
    return found, places.gather(-1, chosen)


def pick(weights: torch.Tensor, uniforms: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """Pick an index (n, 1) into weights (n, k): the first at which the running sum passes a uniform share of the
    total."""
    sums = weights.cumsum(-1)
    targets = torch.as_tensor(uniforms, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True)  # right: a weight of 0 is never picked
