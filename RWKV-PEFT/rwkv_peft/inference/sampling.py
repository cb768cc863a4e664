"""Sample tokens from logits: penalties, temperature, top-k, top-p, min-p and the draw, as functions over a batch.

Shapes: n sequences, V tokens in the vocabulary, k candidates. Top-p is nucleus sampling (Holtzman et al. 2019,
arXiv 1904.09751), the repetition penalty CTRL's (Keskar et al. 2019, arXiv 1909.05858).

Top-p counts probabilities in whole multiples of 2^-52, rounded down. Sums of these up to 2 are exact in float64 and in
int64, in any order. A nucleus is therefore the same set whether tokens are sorted (candidates) or their probabilities'
bits are counted (select), on any device.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .settings import Sampling

FIRST_CANDIDATES = 64  # top-p looks at this many tokens first, and at more if they do not reach its share
SPAN = 64  # neighbours in the vocabulary of which `largest` first looks at the largest
UNITS = 2.0**52  # of probability in 1
HALF = 15  # bits of each half of a probability's bits: those of a float32 from 0 to 1 are below 2^30


def sample(logits: torch.Tensor, uniforms: torch.Tensor | Sequence[float], sampling: Sampling) -> torch.Tensor:
    """Sample a token for each row: logits (n, V), one number in [0, 1) for each row -> tokens (n,) int64. Equal rows
    and numbers give equal tokens, whatever else is in the batch."""
    if sampling.temperature == 0:
        return first_largest(logits)
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64, device=logits.device)
    if selects(sampling) and not logits.is_cpu:
        return select(logits, uniforms, fill_numbers(uniforms.new_empty(3), sampling))
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

    A token that top-k, top-p or min-p leaves out has weight 0 or is not among the k. With top-p, tokens are in order,
    the most probable first.
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
    padded with zeros). On another device it sorts all, because the host would have to wait for the number that
    suffices."""
    size = probabilities.shape[-1]
    k = min(FIRST_CANDIDATES, size) if probabilities.is_cpu else size
    found, tokens = largest(probabilities, k)
    found = whole(found)
    while k < size and (short := (found.sum(-1) < share).nonzero()[:, 0]).numel():
        k = min(16 * k, size) if k < 1000 else size
        found, tokens = (F.pad(x, (0, k - x.shape[1])) for x in (found, tokens))
        more, tokens[short] = largest(probabilities[short], k)
        found[short] = whole(more)
    return found, tokens


def whole(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities in float64, rounded down to multiples of 2^-52."""
    return probabilities.double().mul_(UNITS).floor_().div_(UNITS)


def selects(sampling: Sampling) -> bool:
    """True for a sampling that `select` draws by: with top-p, and without top-k, whose few tokens are soon sorted."""
    return sampling.temperature != 0 and sampling.top_p < 1 and not sampling.top_k


def fill_numbers(numbers: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Fill (3,) float64 with what `select` reads of a sampling -> those that it reads. The host's numbers are arguments
    of launches, which need no copy."""
    reach = max(math.ceil(sampling.top_p * UNITS), 1)  # the most probable token is always in the nucleus
    for number, value in zip(numbers, (sampling.temperature, reach, sampling.min_p)):
        number.fill_(value)
    return numbers if sampling.min_p else numbers[:2]


def select(logits: torch.Tensor, uniforms: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Sample a token for each row with top-p and min-p, as `pick` does from sorted `candidates`, without sorting:
    logits (n, V), uniforms (n,) float64, numbers (2 or 3,) of fill_numbers -> tokens (n,) int64.

    Of equally probable tokens the first comes first. No shape depends on a value and the host reads none, so that a
    CUDA graph can hold it. A row with NaN draws any token: an index outside of a tensor would end a GPU's process.
    """
    logits = logits.float()
    temperature, reach, *min_p = numbers
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)  # no overflow at any temperature
    probabilities = scaled.softmax(-1).nan_to_num_(1 / logits.shape[-1])
    del scaled
    bits = probabilities.view(torch.int32)  # ordered as the probabilities are, because none is negative
    ordered = OrderedMasses((probabilities * UNITS).long(), bits)
    masses, total = ordered.masses, ordered.sums[:, -1:]
    reach = torch.minimum(total, reach.long())
    last, rest = ordered.find(reach)
    mass = (last.int().view(torch.float32) * UNITS).long()  # of each token that is as probable as the last
    nucleus = reach + -rest % mass  # the last token is in the nucleus as a whole
    if min_p:
        likely = masses * (masses >= min_p[0] * masses.amax(-1, keepdim=True))
        nucleus = torch.minimum(nucleus, likely.sum(-1, keepdim=True))
    drawn, rest = ordered.find((uniforms[:, None] * nucleus).long() + 1)
    return torch.searchsorted((masses * (bits == drawn)).cumsum(-1), rest)[:, 0]


class OrderedMasses:
    """Sums of masses (n, V) int64 from the most probable token down. A sum's place is found by two counts of masses:
    by the high half of probabilities' bits (n, V) int32, and within one of these by the low half."""

    def __init__(self, masses: torch.Tensor, bits: torch.Tensor) -> None:
        self.masses = masses
        self.high, self.low = (bits >> HALF).long(), (bits & ((1 << HALF) - 1)).long()
        self.sums = self._sums(self.high, masses)

    def find(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bits of the probability at which the sum reaches target (n, 1), and what of it the tokens with these bits
        make up (n, 1)."""
        high, target = self._find(self.sums, target)
        low, target = self._find(self._sums(self.low, self.masses * (self.high == high)), target)
        return torch.add(low, high, alpha=1 << HALF), target

    @staticmethod
    def _sums(halves: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
        """The sums of masses up to each half, from 0 up: (n, 2^HALF)."""
        zeros = torch.zeros(len(masses), 1 << HALF, dtype=masses.dtype, device=masses.device)
        return zeros.scatter_add_(1, halves, masses).cumsum(-1)

    @staticmethod
    def _find(sums: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The half at which the sum from the last down reaches target, and what is left of target there."""
        below = sums[:, -1:] - target
        half = torch.searchsorted(sums, below, right=True)
        return half, sums.gather(1, half) - below


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


def pick(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Pick an index (n, 1) into weights (n, k): the first at which the running sum passes a uniform share (n,) of the
    total."""
    sums = weights.cumsum(-1)
    targets = uniforms[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True)  # right: a weight of 0 is never picked
