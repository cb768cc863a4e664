"""Decode requests that come and go: sequences join and leave a running batch, and prompts are read between tokens.

Rows that share a model advance together. A model with another adapter on it is another model: a step takes one forward
for each model that has rows, whose frozen weights are the same memory (voices.py).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..models.parts import LanguageModel
from ..models.state import State
from .asked import Answer, Request
from .known import Known, Read
from .pace import Pace
from .reading import prefill, read_packed
from .replay import Forward, forward_of
from .rows import DAMAGED, Group, Row, odds_of, placed, told_odds
from .voices import Voice


@dataclass(eq=False)
class Reading:
    """A request of whose prompt `done` tokens are read, up to `state`, and which has `places` of the batch."""

    request: Request
    done: int
    state: State
    places: int

    @property
    def left(self) -> int:
        """The number of tokens that are still to read."""
        return len(self.request.tokens) - self.done


class Engine:
    """Answers requests of any voices, `batch` answers at a time, in the order in which they were added.

    Each `step` reads as many tokens of prompts as `pace` tells (None: all, because nobody waits for a token), and draws
    a token for each row. Tokens from vocab_size on are never drawn. A request's answers are the same up to rounding,
    whoever shares its batch. `known` has the states that are kept (None: none is). `ahead` hears of a token when the
    next is being computed, so that a GPU has work while the host looks at it; a row that ends is computed once too
    often.
    """

    def __init__(
        self, vocab_size: int, batch: int, known: Known | None = None, pace: Pace | None = None, ahead: bool = False
    ) -> None:
        self.vocab_size, self.batch, self.known, self.pace = vocab_size, batch, known or Known(0), pace
        self.ahead = ahead
        self.waiting: deque[Request] = deque()
        self.reading: deque[Reading] = deque()
        self.groups: dict[LanguageModel, Group] = {}
        self.forwards: dict[LanguageModel, Forward] = {}
        self._open: dict[Answer, None] = {}  # those that have not ended, in the order in which they were added
        self.drawn = self.read = self.reused = 0  # tokens since the start

    @property
    def rows(self) -> int:
        """The number of places of the batch that are taken; another thread may ask meanwhile."""
        reading = sum(reading.places for reading in [*self.reading])
        return reading + sum(len(group.rows) for group in [*self.groups.values()])

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.groups)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self._open.update(dict.fromkeys(request.answers))

    def fail(self, reason: str) -> None:
        """End all that does not wait, after an error that may have left it half advanced, and in no list."""
        self.groups, self.reading = {}, deque()
        waiting = {answer for request in self.waiting for answer in request.answers}
        for answer in [answer for answer in self._open if answer not in waiting]:
            self._finish(answer, reason)

    def forget(self, voice: Voice) -> None:
        """Drop what is kept for a voice that nobody will ask for."""
        self.known.forget(voice)
        self.forwards.pop(voice.model, None)

    @torch.inference_mode()
    def step(self) -> None:
        """Read the tokens that were drawn last and a piece of the prompts, and draw a token for each row."""
        self.waiting = deque(request for request in self.waiting if not self._over(request))
        self.reading = deque(reading for reading in self.reading if not self._over(reading.request))
        for group in self.groups.values():
            group.read(self._forward(group.model))
        if self.ahead:
            self._hear()
        while self.waiting and (free := self.batch - self.rows) > 0:
            self._let_in(self.waiting.popleft(), free)
        self._read()
        if self.pace is not None and not self.ahead:
            self.pace.end()
        for group in self.groups.values():
            group.draw(self.vocab_size, not self.ahead)
        if not self.ahead:
            self._hear()

    def _over(self, request: Request) -> bool:
        """Finish a request whose listeners all have a reason to end it -> True if they had."""
        reasons = [answer.listener.over() for answer in request.answers]
        if not all(reasons):
            return False
        for answer, reason in zip(request.answers, reasons):
            self._finish(answer, reason)
        return True

    def _finish(self, answer: Answer, end: str) -> None:
        del self._open[answer]
        answer.listener.finish(end)

    def _forward(self, model: LanguageModel) -> Forward:
        if model not in self.forwards:
            self.forwards[model] = forward_of(model, self.batch)
        return self.forwards[model]

    def _let_in(self, request: Request, free: int) -> None:
        """Give a request places; answers for which there are none wait, and need no second reading of the prompt."""
        voice, places = request.voice, min(free, len(request.answers))
        read = request.read
        if read is None and not request.scored:
            read = self.known.longest(voice, request.tokens)
            if read is not None:
                request.known = read.length
                self.reused += read.length
        if read is not None and read.length == len(request.tokens):
            self._begin([(0, request, places)], read.logits, read.state)
        elif read is not None:
            self.reading.append(Reading(request, read.length, read.state, places))
        else:
            weight = voice.model.emb.weight
            start = voice.start or State.zeros(voice.model.config, 1, weight.device, weight.dtype)
            self.reading.append(Reading(request, 0, start, places))

    def _read(self) -> None:
        """Read a piece of the prompts of one model; the models take turns."""
        if not self.reading:
            return
        first = self.reading[0].request
        model, scored = first.voice.model, first.scored
        own = [reading for reading in self.reading if reading.request.voice.model is model]
        turn = self._turn([reading for reading in own if not reading.request.scored] if scored is None else own[:1])
        pieces = [piece for _, piece in turn]
        if self.pace is not None:
            self.pace.begin(sum(map(len, pieces)))
        before, *others = (reading.state for reading, _ in turn)
        state = before.joined(*others) if others else before
        if scored is not None:
            logits, state = self._score(turn[0][0], pieces[0])
        else:
            logits, state = (prefill if self.pace is None else read_packed)(model, pieces, state)
        self.read += sum(map(len, pieces))
        begun = []
        for place, (reading, piece) in enumerate(turn):
            request = reading.request
            reading.done += len(piece)
            keeps = bool(self.known.limit) and reading.done in (*request.marks, len(request.tokens))
            if keeps or reading.left:
                reading.state = state.selected(placed([place], logits.device))
            if keeps:
                after = logits[place : place + 1].float()
                self.known.add(request.voice, request.tokens[: reading.done], after, reading.state)
            if not reading.left:
                begun.append((place, request, reading.places))
        read = [reading for reading, _ in turn]
        self.reading = deque(reading for reading in self.reading if reading not in read)
        self.reading.extend(reading for reading in read if reading.left)
        if begun:
            self._begin(begun, logits.float(), state)

    def _turn(self, readings: Sequence[Reading]) -> list[tuple[Reading, list[int]]]:
        """Share a piece among readings -> those that read, each with its next tokens. The first gets half of it, if it
        needs as much; then the shortest come first, so that their answers begin early."""
        if self.pace is None:
            return [(reading, piece_of(reading, reading.left)) for reading in readings]
        first, *others = readings
        free = self.pace.piece(len(readings), sum(len(group.rows) for group in self.groups.values()))
        free -= (own := min(first.left, (free + 1) // 2))
        turn = []
        for reading in sorted(others, key=lambda reading: reading.left):
            if free > 0:
                turn.append((reading, piece_of(reading, free)))
                free -= len(turn[-1][1])
        return [(first, piece_of(first, own + free)), *turn]

    def _score(self, reading: Reading, piece: list[int]) -> tuple[torch.Tensor, State]:
        """Read the next piece of a prompt, and tell of the Odds of its tokens -> logits after it (1, V), the State."""
        request, voice = reading.request, reading.request.voice
        logits, state = voice.model(torch.tensor([piece], device=reading.state[0].wkv.device), reading.state)
        assert request.scored is not None
        following = request.tokens[reading.done + 1 : reading.done + len(piece) + 1]
        for row, token in zip(logits[0], placed(following, logits.device).split(1)):
            request.scored(told_odds(odds_of(row[: self.vocab_size], token, request.top).tolist()))
        return logits[:, -1], state

    def _begin(self, begun: Sequence[tuple[int, Request, int]], logits: torch.Tensor, state: State) -> None:
        """Let rows join those of their model: for each (place, request, number of answers), so many rows from a place
        of logits (n, V) and state on. The other answers of the request wait for places."""
        rows, owners = list[Row](), list[int]()
        for place, request, number in begun:
            rows += [Row(request.voice, list(request.tokens), answer) for answer in request.answers[:number]]
            owners += [place] * number
            if rest := request.answers[number:]:
                own = placed([place], logits.device)
                read = Read(len(request.tokens), logits[own], state.selected(own))
                self.waiting.appendleft(replace(request, answers=rest, read=read))
        chosen, model = placed(owners, logits.device), begun[0][1].voice.model
        group = Group(model, rows, logits[chosen], state.selected(chosen))
        if model in self.groups:
            self.groups[model].join(group)
        else:
            self.groups[model] = group

    def _hear(self) -> None:
        """Tell of the tokens that were drawn last; the rows that end with them leave."""
        for group in [*self.groups.values()]:
            staying = []
            for place, row, token, odds in group.heard():
                end = DAMAGED if token is None else row.hear(token, odds)
                self.drawn += token is not None
                if not end:
                    staying.append(place)
                    continue
                read = row.tokens if self.ahead else row.tokens[:-1]
                if self.known.limit and (self.ahead or row.length > 1) and token is not None:
                    self.known.add(row.voice, read, *group.own(place))
                self._finish(row.answer, end)
            if not staying:
                del self.groups[group.model]
            elif len(staying) < len(group.rows):
                group.keep(staying)
        if self.pace is not None and self.ahead:
            self.pace.end()


def piece_of(reading: Reading, most: int) -> list[int]:
    """The next tokens of a prompt to read, up to its next mark."""
    tokens, begin = reading.request.tokens, reading.done
    end = min((mark for mark in reading.request.marks if mark > begin), default=len(tokens))
    return tokens[begin : min(end, begin + most)]
