"""The rows of a batch, which share a model: the next token of each is drawn here, and told to the host."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..models.parts import LanguageModel
from ..models.state import State
from .asked import Answer, Odds
from .replay import Forward
from .sampling import count, measure, penalize, sample
from .settings import Sampling
from .voices import Voice

DAMAGED = "damaged"  # why a row ends whose logits are NaN or Inf
LOST = "lost"  # why a row ends that cannot be held to its form any more


@dataclass(eq=False)
class Row:
    """An answer that is being drawn; tokens are the prompt's and those drawn."""

    voice: Voice
    tokens: list[int]
    answer: Answer
    length: int = 0
    counts: torch.Tensor | None = None  # (1, V), if the sampling penalizes
    draws: random.Random = field(init=False)
    manner: Sampling = field(init=False)  # equal for rows that are drawn in the same way

    def __post_init__(self) -> None:
        self.draws = self.answer.draws or random.Random(self.answer.sampling.seed)
        self.manner = self.answer.sampling.seeded(-self.answer.sampling.seed)

    def hear(self, token: int, odds: Odds | None) -> str:
        """Take the token that was drawn, and tell it -> why the row ends with it, or ""."""
        self.length += 1
        self.tokens.append(token)
        if self.answer.held is not None and not self.answer.held.take(token):
            return LOST
        return self.answer.listener.draw(token, odds) or ("length" if self.length >= self.answer.max_tokens else "")


class Drawn(NamedTuple):
    """The tokens (n,) of a draw, and what the host hears of them when `copied` has happened, if it is given: told
    (4, n), the tokens, whether the row's logits were finite, log-probabilities and entropies; and odds_of by rows."""

    tokens: torch.Tensor
    told: torch.Tensor
    odds: Mapping[int, torch.Tensor]
    copied: torch.cuda.Event | None


@dataclass(eq=False)
class Group:
    """Rows of a model, with the logits (n, V) and the State after what they have read; `drawn` is what was drawn last,
    which may be `unread` yet."""

    model: LanguageModel
    rows: list[Row]
    logits: torch.Tensor
    state: State
    drawn: Drawn | None = None
    unread = False

    def join(self, other: "Group") -> None:
        self.rows += other.rows
        self.logits, self.state = torch.cat([self.logits, other.logits]), self.state.joined(other.state)

    def keep(self, places: Sequence[int]) -> None:
        """Let all other rows leave."""
        kept = placed(places, self.logits.device)
        self.rows = [self.rows[place] for place in places]
        self.logits, self.state = self.logits[kept], self.state.selected(kept)
        if self.drawn is not None:
            self.drawn = self.drawn._replace(tokens=self.drawn.tokens[kept])

    def heard(self) -> Iterator[tuple[int, Row, int | None, Odds | None]]:
        """Yield what was drawn: each place, its row, the token (None if its logits were not finite) and the odds."""
        assert self.drawn is not None
        if self.drawn.copied is not None:
            self.drawn.copied.synchronize()
        for place, (row, told) in enumerate(zip(self.rows, self.drawn.told.T.tolist())):
            token, sound, logprob, entropy = told
            odds = Odds(logprob, (), entropy) if row.manner.measured else None
            if place in self.drawn.odds:
                odds = told_odds(self.drawn.odds[place].tolist())
            yield place, row, int(token) if sound else None, odds

    def own(self, place: int) -> tuple[torch.Tensor, State]:
        """The logits (1, V) and the State of one row, in memory of their own."""
        return self.logits[place : place + 1].clone(), self.state.selected(placed([place], self.logits.device))

    def read(self, forward: Forward) -> None:
        assert self.drawn is not None
        logits, self.state = forward(self.drawn.tokens[:, None], self.state)
        self.logits, self.unread = logits[:, 0].float(), False

    def draw(self, vocab_size: int, waits: bool) -> None:
        """Draw a token below vocab_size for each row. Unless it `waits`, the host needs nothing from a GPU for it."""
        sound = torch.isfinite(self.logits.sum(-1))  # a sum with NaN or Inf in it is not finite
        if not waits or not sound.all():  # nothing can be drawn from NaN
            self.logits = self.logits.masked_fill(~sound[:, None], 0.0)
        choices = self.logits[:, :vocab_size]
        manners: dict[Sampling, list[int]] = {}
        for place, row in enumerate(self.rows):
            manners.setdefault(row.manner, []).append(place)
        if len(manners) == 1:
            found = draws(self.rows, choices, self.rows[0].manner)
        else:
            found = choices.new_empty(3, len(self.rows), dtype=torch.float64)
            for manner, places in manners.items():
                own = placed(places, choices.device)
                found[:, own] = draws([self.rows[place] for place in places], choices[own], manner)
        tokens = found[0].long()
        asked = {place: row.answer.odds for place, row in enumerate(self.rows) if row.answer.odds is not None}
        odds = {place: odds_of(choices[place], tokens[place : place + 1], top) for place, top in asked.items()}
        told = torch.cat([found[:1], sound[None].double(), found[1:]])
        sent = {place: numbers.to("cpu", non_blocking=True) for place, numbers in odds.items()}
        self.drawn = Drawn(tokens, told.to("cpu", non_blocking=True), sent, event_of(tokens))
        self.unread = True


def draws(rows: Sequence[Row], logits: torch.Tensor, manner: Sampling) -> torch.Tensor:
    """Draw a token for each row in one manner: logits (n, V) -> (3, n) float64: the tokens, and their log-probabilities
    and entropies if the manner is measured."""
    if manner.penalizes:
        zeros = logits.new_zeros(1, logits.shape[1])
        counts = torch.cat([zeros if row.counts is None else row.counts for row in rows])
        logits = penalize(logits, counts, manner)
    free = logits
    if any(row.answer.held for row in rows):
        logits = torch.stack([masked(row, own) for row, own in zip(rows, logits)])
    tokens = sample(logits, placed([row.draws.random() for row in rows], logits.device), manner)
    if manner.penalizes:
        count(counts, tokens, manner.penalty_decay)
        for row, counted in zip(rows, counts.split(1)):
            row.counts = counted
    measures = measure(free, tokens, manner) if manner.measured else tokens.new_zeros(2, len(rows))
    return torch.cat([tokens[None].double(), measures.double()])


def placed(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor, int64 or float64, on a device for which nobody waits."""
    tensor = torch.tensor(values, dtype=torch.float64 if values and isinstance(values[0], float) else torch.long)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def event_of(tensor: torch.Tensor) -> torch.cuda.Event | None:
    """An event that happens when a GPU has done all that it was asked for so far; None on a CPU."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def masked(row: Row, logits: torch.Tensor) -> torch.Tensor:
    """logits (V) without the tokens that the form of a row's answer forbids."""
    held = row.answer.held
    return logits if held is None else logits.masked_fill(~held.allowed().to(logits.device), -torch.inf)


def odds_of(logits: torch.Tensor, token: torch.Tensor, top: int) -> torch.Tensor:
    """The log-probability of a token (1,) by logits (V), those of the `top` most probable ones, and these ->
    (1 + 2 top,) float64."""
    found = logits.float().log_softmax(-1)
    values, tokens = found.topk(min(top, len(found)))
    return torch.cat([found.index_select(0, token).double(), values.double(), tokens.double()])


def told_odds(numbers: Sequence[float]) -> Odds:
    """The Odds that odds_of computed."""
    top = len(numbers) // 2
    return Odds(numbers[0], tuple(zip(map(int, numbers[1 + top :]), numbers[1 : 1 + top])))
