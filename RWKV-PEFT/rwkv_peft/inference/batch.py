"""The running sequences of one model: a token of each is sampled here, without a wait for the GPU, and then handed to
the host."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..models.parts import LanguageModel
from ..models.state import State
from .forward import Draw, Forward
from .requests import Completion, Logprobs
from .sampling import count, measure, penalize
from .settings import Sampling
from .speakers import Speaker

DAMAGED = "damaged"  # the end of a sequence with logits that are NaN or Inf
LOST = "lost"  # the end of a sequence that can no longer follow its constraint


@dataclass(eq=False)
class Slot:
    """A place of the batch and the completion in it; tokens are the prompt's and those sampled."""

    speaker: Speaker
    tokens: list[int]
    completion: Completion
    length: int = 0
    counts: torch.Tensor | None = None  # (1, V), if the sampling penalizes
    draws: random.Random = field(init=False)
    sampling: Sampling = field(init=False)  # without its seed and top_logprobs: equal ones are sampled together

    def __post_init__(self) -> None:
        self.draws = self.completion.draws or random.Random(self.completion.sampling.seed)
        self.sampling = replace(self.completion.sampling, seed=0, top_logprobs=None)

    def take(self, token: int, logprobs: Logprobs | None) -> str:
        """Append the token and hand it to the listener -> the reason to end with it, or ""."""
        self.length += 1
        self.tokens.append(token)
        completion = self.completion
        if completion.constraint is not None and not completion.constraint.accept(token):
            return LOST
        end = completion.listener.on_token(token, logprobs)
        return end or ("length" if self.length >= completion.max_tokens else "")


class SampledTokens(NamedTuple):
    """Tokens (n,), and their copies on the host, valid once `copied` has happened: `host` (4, n), the tokens, a mask of
    finite logits, log-probabilities and entropies; and token_logprobs by slots."""

    tokens: torch.Tensor
    host: torch.Tensor
    logprobs: Mapping[int, torch.Tensor]
    copied: torch.cuda.Event | None


@dataclass(eq=False)
class ModelBatch:
    """The slots of a model, with the logits (n, V) and the State after the tokens that it has read. `sampled` are the
    latest tokens, which may be `unread` yet."""

    model: LanguageModel
    slots: list[Slot]
    logits: torch.Tensor
    state: State
    sampled: SampledTokens | None = None
    unread = False

    def join(self, other: "ModelBatch") -> None:
        self.slots += other.slots
        self.logits, self.state = torch.cat([self.logits, other.logits]), self.state.joined(other.state)

    def select(self, places: Sequence[int]) -> None:
        """Drop all other slots."""
        rows = on_device(places, self.logits.device)
        self.slots = [self.slots[place] for place in places]
        self.logits, self.state = self.logits[rows], self.state.selected(rows)
        if self.sampled is not None:
            self.sampled = self.sampled._replace(tokens=self.sampled.tokens[rows])

    def results(self) -> Iterator[tuple[int, Slot, int | None, Logprobs | None]]:
        """Yield each place, its slot, the token sampled (None if its logits were not finite) and the Logprobs."""
        assert self.sampled is not None
        if self.sampled.copied is not None:
            self.sampled.copied.synchronize()
        for place, (slot, numbers) in enumerate(zip(self.slots, self.sampled.host.T.tolist())):
            token, finite, logprob, entropy = numbers
            logprobs = Logprobs(logprob, (), entropy) if slot.sampling.measured else None
            if place in self.sampled.logprobs:
                logprobs = unpack_logprobs(self.sampled.logprobs[place].tolist())
            yield place, slot, int(token) if finite else None, logprobs

    def snapshot(self, place: int) -> tuple[torch.Tensor, State]:
        """The logits (1, V) and the State of one slot, in memory of their own."""
        return self.logits[place : place + 1].clone(), self.state.selected(on_device([place], self.logits.device))

    def advance(self, forward: Forward) -> None:
        """Read the tokens sampled last."""
        assert self.sampled is not None
        logits, self.state = forward(self.sampled.tokens[:, None], self.state)
        self.logits, self.unread = logits[:, 0].float(), False

    def sample(self, vocab_size: int, draw: Draw, waits: bool) -> None:
        """Sample a token below vocab_size for each slot. With `waits`, the host may wait for a result of the device."""
        finite = torch.isfinite(self.logits.sum(-1))  # a sum with NaN or Inf in it is not finite
        if not waits or not finite.all():  # NaN cannot be sampled from
            self.logits = self.logits.masked_fill(~finite[:, None], 0.0)
        choices = self.logits[:, :vocab_size]
        alike: dict[Sampling, list[int]] = {}
        for place, slot in enumerate(self.slots):
            alike.setdefault(slot.sampling, []).append(place)
        if len(alike) == 1:
            found = sample_slots(self.slots, choices, self.slots[0].sampling, draw)
        else:
            found = choices.new_empty(3, len(self.slots), dtype=torch.float64)
            for sampling, places in alike.items():
                rows = on_device(places, choices.device)
                found[:, rows] = sample_slots([self.slots[place] for place in places], choices[rows], sampling, draw)
        tokens = found[0].long()
        tops = {place: slot.completion.sampling.top_logprobs for place, slot in enumerate(self.slots)}
        logprobs = {
            place: token_logprobs(choices[place], tokens[place : place + 1], top).to("cpu", non_blocking=True)
            for place, top in tops.items()
            if top is not None
        }
        host = torch.cat([found[:1], finite[None].double(), found[1:]]).to("cpu", non_blocking=True)
        copied = None
        if tokens.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.sampled = SampledTokens(tokens, host, logprobs, copied)
        self.unread = True


def sample_slots(slots: Sequence[Slot], logits: torch.Tensor, sampling: Sampling, draw: Draw) -> torch.Tensor:
    """Sample a token for each slot, all by one sampling: logits (n, V) -> (3, n) float64: the tokens, and their
    log-probabilities and entropies if the sampling is measured, else 0."""
    if sampling.logit_bias:
        biased, values = (on_device(numbers, logits.device) for numbers in zip(*sampling.logit_bias))
        logits = logits.index_add(1, biased, values.to(logits).expand(len(slots), -1))
    if sampling.penalizes:
        zeros = logits.new_zeros(1, logits.shape[1])
        counts = torch.cat([zeros if slot.counts is None else slot.counts for slot in slots])
        logits = penalize(logits, counts, sampling)
    free = logits
    constraints = [slot.completion.constraint for slot in slots]
    allowed = [None if constraint is None else constraint.allowed() for constraint in constraints]
    if any(mask is not None for mask in allowed):
        logits = torch.stack([masked(row, mask) for row, mask in zip(logits, allowed)])
    tokens = draw(logits, on_device([slot.draws.random() for slot in slots], logits.device), sampling)
    if sampling.penalizes:
        count(counts, tokens, sampling.penalty_decay)
        for slot, counted in zip(slots, counts.split(1)):
            slot.counts = counted
    measures = measure(free, tokens, sampling) if sampling.measured else tokens.new_zeros(2, len(slots))
    return torch.cat([tokens[None].double(), measures.double()])


def masked(logits: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """logits (V) with -inf for the tokens that are not among the allowed ones (V,) bool."""
    return logits if allowed is None else logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def on_device(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor, int64 or float64, copied without a wait."""
    tensor = torch.tensor(values, dtype=torch.float64 if values and isinstance(values[0], float) else torch.long)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def token_logprobs(logits: torch.Tensor, token: torch.Tensor, top: int) -> torch.Tensor:
    """The log-probability of a token (1,) by logits (V), those of the `top` most probable ones, and these ->
    (1 + 2 top,) float64."""
    found = logits.float().log_softmax(-1)
    values, tokens = found.topk(min(top, len(found)))
    return torch.cat([found.index_select(0, token).double(), values.double(), tokens.double()])


def unpack_logprobs(numbers: Sequence[float]) -> Logprobs:
    """The Logprobs in a result of token_logprobs."""
    top = len(numbers) // 2
    return Logprobs(numbers[0], tuple(zip(map(int, numbers[1 + top :]), numbers[1 : 1 + top])))
