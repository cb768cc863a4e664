"""Decode requests that come and go: sequences join and leave a running batch, and prompts are read between tokens.

Rows that share a model advance together. A model with another adapter on it is another model: a step takes one forward
for each model that has rows, whose frozen weights are the same memory (voices.py).
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..models.parts import LanguageModel
from ..models.state import State
from .asked import Answer, Odds, Request
from .decode import read_packed
from .known import Known
from .sampling import count, penalize, sample
from .settings import Sampling
from .voices import Voice

ALONE = 4  # times as large a piece is read while no row answers
DAMAGED = "damaged"  # why a row ends whose logits are NaN or Inf


@dataclass(eq=False)
class Reading:
    """A request of whose prompt `done` tokens are read, up to `state`."""

    request: Request
    done: int
    state: State


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
        self.draws = random.Random(self.answer.sampling.seed)
        self.manner = replace(self.answer.sampling, seed=0)


@dataclass(eq=False)
class Group:
    """The rows of a model, with the logits (n, V) and the State from which their next tokens are drawn."""

    rows: list[Row]
    logits: torch.Tensor
    state: State

    def join(self, other: "Group") -> None:
        self.rows += other.rows
        self.logits, self.state = torch.cat([self.logits, other.logits]), self.state.joined(other.state)


class Engine:
    """Answers requests of any voices, `batch` answers at a time, in the order in which they were added.

    Each `step` reads `piece` tokens of prompts at most, and draws a token for each row. Tokens from vocab_size on are
    never drawn. A request's answers are the same up to rounding, whoever shares its batch.
    """

    def __init__(self, vocab_size: int, batch: int, known: Known, piece: int = 64) -> None:
        self.vocab_size, self.batch, self.known, self.piece = vocab_size, batch, known, piece
        self.waiting: deque[Request] = deque()
        self.reading: deque[Reading] = deque()
        self.groups: dict[LanguageModel, Group] = {}
        self.drawn = self.read = self.reused = 0  # tokens since the start

    @property
    def rows(self) -> int:
        """The number of places of the batch that are taken."""
        reading = sum(len(reading.request.answers) for reading in self.reading)
        return reading + sum(len(group.rows) for group in self.groups.values())

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.groups)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def fail(self, reason: str) -> None:
        """End all that is being answered, after an error that may have left it half advanced."""
        rows = [row.answer for group in self.groups.values() for row in group.rows]
        asked = [answer for reading in self.reading for answer in reading.request.answers]
        self.groups, self.reading = {}, deque()
        for answer in rows + asked:
            answer.listener.finish(reason)

    @torch.inference_mode()
    def step(self) -> None:
        """Let requests in, read a piece of their prompts, and draw a token for each row."""
        self.waiting = deque(request for request in self.waiting if not ended(request))
        self.reading = deque(reading for reading in self.reading if not ended(reading.request))
        while self.waiting and (not self.rows or self.rows + len(self.waiting[0].answers) <= self.batch):
            self._let_in(self.waiting.popleft())
        self._read()
        for model, group in list(self.groups.items()):
            self._advance(model, group)
            if not group.rows:
                del self.groups[model]

    def _let_in(self, request: Request) -> None:
        voice = request.voice
        read = None if request.scored else self.known.longest(voice, request.tokens)
        if read is None:
            weight = voice.model.emb.weight
            start = voice.start or State.zeros(voice.model.config, 1, weight.device, weight.dtype)
            self.reading.append(Reading(request, 0, start))
            return
        request.known = read.length
        self.reused += read.length
        if read.length == len(request.tokens):
            self._begin(request, read.logits, read.state)
        else:
            self.reading.append(Reading(request, read.length, read.state))

    def _read(self) -> None:
        """Read a piece of the prompts of one model; the models take turns, and its prompts share the piece."""
        if not self.reading:
            return
        first, piece = self.reading[0].request, self.piece if self.groups else ALONE * self.piece
        model, scored = first.voice.model, first.scored
        turn = [reading for reading in self.reading if reading.request.voice.model is model][:piece]
        turn = [reading for reading in turn if not reading.request.scored] if scored is None else turn[:1]
        pieces = [piece_of(reading, piece // len(turn)) for reading in turn]
        state = turn[0].state
        for reading in turn[1:]:
            state = state.joined(reading.state)
        logits, state = read_packed(model, pieces, state) if scored is None else self._score(turn[0], pieces[0])
        self.read += sum(map(len, pieces))
        self.reading = deque(reading for reading in self.reading if reading not in turn)
        for place, (reading, read) in enumerate(zip(turn, pieces)):
            request = reading.request
            own = logits[place : place + 1].float()
            reading.done += len(read)
            reading.state = state.selected(torch.tensor([place], device=logits.device))
            if reading.done in (*request.marks, len(request.tokens)):
                self.known.add(request.voice, request.tokens[: reading.done], own, reading.state)
            if reading.done == len(request.tokens):
                self._begin(request, own, reading.state)
            else:
                self.reading.append(reading)

    def _score(self, reading: Reading, piece: list[int]) -> tuple[torch.Tensor, State]:
        """Read the next piece of a prompt, and tell of the Odds of its tokens -> logits after it (1, V), the State."""
        request, voice = reading.request, reading.request.voice
        logits, state = voice.model(torch.tensor([piece], device=reading.state[0].wkv.device), reading.state)
        assert request.scored is not None
        for row, token in zip(logits[0], request.tokens[reading.done + 1 : reading.done + len(piece) + 1]):
            request.scored(odds_of(row[: self.vocab_size], token, request.top))
        return logits[:, -1], state

    def _begin(self, request: Request, logits: torch.Tensor, state: State) -> None:
        """Let the rows of a request whose prompt is read join those of its model."""
        rows = [Row(request.voice, list(request.tokens), answer) for answer in request.answers]
        group = Group(rows, logits.repeat(len(rows), 1), state.repeated(len(rows)))
        if (own := self.groups.get(request.voice.model)) is None:
            self.groups[request.voice.model] = group
        else:
            own.join(group)

    def _advance(self, model: LanguageModel, group: Group) -> None:
        """Draw a token for each row, and read those of the rows that go on."""
        sound = torch.isfinite(group.logits.sum(-1))
        finite = sound.tolist()
        if not all(finite):  # nothing can be drawn from NaN
            group.logits = group.logits.masked_fill(~sound[:, None], 0.0)
        choices = group.logits[:, : self.vocab_size]
        staying, tokens = [], []
        for place, (row, token) in enumerate(zip(group.rows, self._draw(group.rows, choices))):
            end = self._heard(row, token, choices[place]) if finite[place] else DAMAGED
            if not end:
                staying.append(place)
                tokens.append(token)
                continue
            if row.length > 1 and finite[place]:
                own = group.state.selected(torch.tensor([place], device=choices.device))
                self.known.add(row.voice, row.tokens[:-1], group.logits[place : place + 1].clone(), own)
            row.answer.listener.finish(end)
        if len(staying) < len(group.rows):
            group.rows = [group.rows[place] for place in staying]
            group.state = group.state.selected(torch.tensor(staying, dtype=torch.long, device=choices.device))
        if group.rows:
            logits, group.state = model(torch.tensor(tokens, device=choices.device)[:, None], group.state)
            group.logits = logits[:, 0].float()

    def _heard(self, row: Row, token: int, logits: torch.Tensor) -> str:
        """Tell a row's listener of its token; logits (V) -> why the row ends with it, or ""."""
        answer = row.answer
        row.length += 1
        row.tokens.append(token)
        self.drawn += 1
        if answer.held is not None:
            answer.held.take(token)
        odds = None if answer.odds is None else odds_of(logits, token, answer.odds)
        return answer.listener.draw(token, odds) or ("length" if row.length >= answer.max_tokens else "")

    def _draw(self, rows: Sequence[Row], logits: torch.Tensor) -> list[int]:
        """Draw a token for each row from logits (n, V); those that are drawn in the same way at once."""
        manners: dict[Sampling, list[int]] = {}
        for place, row in enumerate(rows):
            manners.setdefault(row.manner, []).append(place)
        tokens = [0] * len(rows)
        for manner, places in manners.items():
            drawing = [rows[place] for place in places]
            own = logits if len(manners) == 1 else logits[places]
            if manner.penalizes:
                zeros = own.new_zeros(1, own.shape[1])
                counts = torch.cat([zeros if row.counts is None else row.counts for row in drawing])
                own = penalize(own, counts, manner)
            if any(row.answer.held for row in drawing):
                own = torch.stack([masked(row, logits) for row, logits in zip(drawing, own)])
            found = sample(own, [row.draws.random() for row in drawing], manner)
            if manner.penalizes:
                count(counts, found, manner.penalty_decay)
                for row, counted in zip(drawing, counts.split(1)):
                    row.counts = counted
            for place, token in zip(places, found.tolist()):
                tokens[place] = token
        return tokens


def ended(request: Request) -> bool:
    """Finish a request whose listeners all have a reason to end it -> True if they had."""
    reasons = [answer.listener.over() for answer in request.answers]
    if not all(reasons):
        return False
    for answer, reason in zip(request.answers, reasons):
        answer.listener.finish(reason)
    return True


def piece_of(reading: Reading, most: int) -> list[int]:
    """The next tokens of a prompt to read, up to its next mark."""
    tokens, begin = reading.request.tokens, reading.done
    end = min((mark for mark in reading.request.marks if mark > begin), default=len(tokens))
    return tokens[begin : min(end, begin + most)]


def masked(row: Row, logits: torch.Tensor) -> torch.Tensor:
    """logits (V) without the tokens that the form of a row's answer forbids."""
    held = row.answer.held
    return logits if held is None else logits.masked_fill(~held.allowed().to(logits.device), -torch.inf)


def odds_of(logits: torch.Tensor, token: int, top: int) -> Odds:
    """The Odds of a token by logits (V), with those of the `top` most probable ones."""
    found = logits.float().log_softmax(-1)
    values, tokens = found.topk(min(top, len(found)))
    return Odds(found[token].item(), tuple(zip(tokens.tolist(), values.tolist())))
