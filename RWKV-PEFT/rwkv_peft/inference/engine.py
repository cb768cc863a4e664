"""Continuous batching: sequences join and leave a running batch, and prompts are read between two sampled tokens.

Sequences of one model advance together. A model with another adapter on it is another model: a step runs one forward
for each model that has sequences; their frozen weights are the same memory (speakers.py).
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..models.parts import LanguageModel
from ..models.state import State
from .batch import DAMAGED, ModelBatch, Slot, on_device
from .forward import Draw, Forward, draw_of, forward_of, prefill, read_packed
from .requests import CachedPrefix, Completion, GenerationRequest, PrefixCache

LEAST, MOST = 16, 4096  # tokens of a PrefillBudget
CROWD, ALONE = 1.5, 8.0  # times as many tokens at most are read while many wait, beside running sequences or none


class PrefillBudget:
    """The number of prompt `tokens` to read in a step, more while many wait and few are being sampled.

    With `seconds`, it follows the machine: as many tokens as are read in that time beyond the time of a pass over few,
    or in the time of the batch's own step if that is longer. No next token is delayed by much more than its own time,
    or CROWD times `seconds`, and the pass over few.
    """

    def __init__(self, tokens: int, seconds: float = 0.0) -> None:
        self.tokens, self.seconds = tokens, seconds
        self.read, self.began, self.ended = 0, 0.0, math.inf
        self.few = 0.0  # seconds of the fastest pass over fewer tokens than LEAST, which reads all weights as any does
        self.sums = float(tokens), seconds  # tokens read, and seconds beyond `few`, each pass counting half of the next

    def due(self, waiting: int, running: int) -> int:
        """The tokens to read for `waiting` prompts beside `running` sequences."""
        share = min((waiting + running) / running, CROWD) if running else ALONE
        if self.seconds and running:
            share = max(share, (time.perf_counter() - self.ended) / self.seconds)
        return min(int(self.tokens * share), MOST)

    def begin(self, tokens: int) -> None:
        """Start the clock of a pass over so many prompt tokens."""
        self.read, self.began = tokens, time.perf_counter()

    def end(self) -> None:
        """Stop the clock: the pass is computed."""
        seconds = time.perf_counter() - self.began
        if self.seconds and self.read >= LEAST:
            # A budget that paid for the weights too would shrink until they take all of its time. The eighth: a first
            # pass over few may be slow.
            spent = max(seconds - self.few, seconds / 8)
            self.sums = self.sums[0] / 2 + self.read, self.sums[1] / 2 + spent
            self.tokens = int(min(max(self.seconds * self.sums[0] / self.sums[1], LEAST), MOST))
        elif self.read:
            self.few = min(self.few or seconds, seconds)
        self.read = 0

    def leave(self) -> None:
        """The batch's own step begins."""
        self.ended = time.perf_counter()


@dataclass(eq=False)
class PartialPrompt:
    """A request with `done` tokens of its prompt read, up to `state`, and `places` of the batch reserved."""

    request: GenerationRequest
    done: int
    state: State
    places: int

    @property
    def left(self) -> int:
        """The number of tokens still to read."""
        return len(self.request.tokens) - self.done

    def piece(self, most: int) -> list[int]:
        """The next tokens to read, up to the next mark."""
        tokens, begin = self.request.tokens, self.done
        end = min((mark for mark in self.request.marks if mark > begin), default=len(tokens))
        return tokens[begin : min(end, begin + most)]


class Engine:
    """Runs requests of any speakers, `batch` completions at a time, in the order in which they were added.

    Each `step` reads as many prompt tokens as the `budget` allows (None: all), and samples a token of each sequence,
    below vocab_size. A completion is the same up to rounding, whatever shares its batch. With `overlap`, tokens reach
    the listeners while the next are being computed, so that a GPU never waits for the host; a sequence that ends is
    computed once too often.
    """

    def __init__(
        self,
        vocab_size: int,
        batch: int,
        cache: PrefixCache | None = None,
        budget: PrefillBudget | None = None,
        overlap: bool = False,
    ) -> None:
        self.vocab_size, self.batch, self.cache, self.budget = vocab_size, batch, cache or PrefixCache(0), budget
        self.overlap = overlap
        self.waiting: deque[GenerationRequest] = deque()
        self.prompts: deque[PartialPrompt] = deque()
        self.batches: dict[LanguageModel, ModelBatch] = {}
        self.forwards: dict[LanguageModel, Forward] = {}
        self.draw: Draw | None = None  # of all models, which are on one device
        self.zeros: dict[LanguageModel, State] = {}  # before the first token
        self._open: dict[Completion, None] = {}  # those that have not ended, in the order in which they were added
        self.sampled = self.read = self.reused = 0  # tokens since the start

    @property
    def places_taken(self) -> int:
        """The number of places of the batch in use; safe to read from another thread."""
        return sum(prompt.places for prompt in [*self.prompts]) + self._running()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prompts or self.batches)

    def add(self, request: GenerationRequest) -> None:
        self.waiting.append(request)
        self._open.update(dict.fromkeys(request.completions))

    def fail(self, reason: str) -> None:
        """End all that does not wait, after an error that may have left it half advanced, and in no list."""
        self.batches, self.prompts = {}, deque()
        waiting = {completion for request in self.waiting for completion in request.completions}
        for completion in [completion for completion in self._open if completion not in waiting]:
            self._end(completion, reason)

    def forget(self, model: LanguageModel) -> None:
        """Free the graphs and the state of a model that has left."""
        self.forwards.pop(model, None)
        self.zeros.pop(model, None)

    @torch.inference_mode()
    def step(self) -> None:
        """Read the tokens sampled last and a piece of the prompts, and sample a token of each sequence."""
        self.waiting = deque(request for request in self.waiting if not self._cancelled(request))
        self.prompts = deque(prompt for prompt in self.prompts if not self._cancelled(prompt.request))
        for batch in self.batches.values():
            if batch.model not in self.forwards:
                self.forwards[batch.model] = forward_of(batch.model, self.batch)
            batch.advance(self.forwards[batch.model])
        if self.overlap:
            self._deliver()
        while self.waiting and (free := self.batch - self.places_taken) > 0:
            self._admit(self.waiting.popleft(), free)
        begun = self._read()
        if self.budget is not None and not self.overlap:
            self.budget.end()
        if begun is not None:
            self._begin(*begun)
        if self.budget is not None and not self.overlap:
            self.budget.leave()
        for batch in self.batches.values():
            self.draw = self.draw or draw_of(batch.model, self.vocab_size, self.batch)
            batch.sample(self.vocab_size, self.draw, not self.overlap)
        if not self.overlap:
            self._deliver()

    def _running(self) -> int:
        return sum(len(batch.slots) for batch in [*self.batches.values()])

    def _cancelled(self, request: GenerationRequest) -> bool:
        """End a request if all of its completions are cancelled -> True if they are."""
        reasons = [completion.listener.cancelled() for completion in request.completions]
        if not all(reasons):
            return False
        for completion, reason in zip(request.completions, reasons):
            self._end(completion, reason)
        return True

    def _end(self, completion: Completion, reason: str) -> None:
        del self._open[completion]
        completion.listener.on_end(reason)

    def _admit(self, request: GenerationRequest, free: int) -> None:
        """Reserve places for a request, and begin behind the longest cached prefix of its prompt."""
        speaker, places = request.speaker, min(free, len(request.completions))
        prefix = request.prefix
        if prefix is None:
            prefix = self.cache.longest(speaker, request.tokens)
            if prefix is not None:
                request.cached = prefix.length
                self.reused += prefix.length
        if prefix is None:
            model, weight = speaker.model, speaker.model.emb.weight
            if speaker.start is None and model not in self.zeros:
                self.zeros[model] = State.zeros(model.config, 1, weight.device, weight.dtype)
            self.prompts.append(PartialPrompt(request, 0, speaker.start or self.zeros[model], places))
        elif prefix.length < len(request.tokens):
            self.prompts.append(PartialPrompt(request, prefix.length, prefix.state, places))
        else:
            self._begin([(0, request, places)], prefix.logits, prefix.state)

    def _read(self) -> tuple[list[tuple[int, GenerationRequest, int]], torch.Tensor, State] | None:
        """Read a piece of the prompts of one model -> what `_begin` takes, for those that are read to their ends. The
        models take turns."""
        if not self.prompts:
            return None
        first = self.prompts[0].request
        model = first.speaker.model
        turn = self._turn([prompt for prompt in self.prompts if prompt.request.speaker.model is model])
        pieces = [piece for _, piece in turn]
        total = sum(map(len, pieces))
        if self.budget is not None:
            self.budget.begin(total)
        before, *others = (prompt.state for prompt, _ in turn)
        if all(other is before for other in others):  # as most are: copying one is faster than copying each
            state = before.repeated(len(turn)) if others else before
        else:
            state = before.joined(*others)
        logits, state = (prefill if self.budget is None else read_packed)(model, pieces, state)
        self.read += total
        begun = []
        for place, (prompt, piece) in enumerate(turn):
            request = prompt.request
            prompt.done += len(piece)
            caches = bool(self.cache.limit) and prompt.done in (*request.marks, len(request.tokens))
            if caches or prompt.left:
                prompt.state = state.selected(on_device([place], logits.device))
            if caches:
                after = logits[place : place + 1].float()
                self.cache.add(request.speaker, request.tokens[: prompt.done], after, prompt.state)
            if not prompt.left:
                begun.append((place, request, prompt.places))
        read = [prompt for prompt, _ in turn]
        self.prompts = deque(prompt for prompt in self.prompts if prompt not in read)
        self.prompts.extend(prompt for prompt in read if prompt.left)
        return (begun, logits.float(), state) if begun else None

    def _turn(self, prompts: Sequence[PartialPrompt]) -> list[tuple[PartialPrompt, list[int]]]:
        """Share the budget among prompts -> those to read, each with its next tokens. The first gets half if it needs
        as much; then the shortest come first, so that their answers begin early."""
        if self.budget is None:
            return [(prompt, prompt.piece(prompt.left)) for prompt in prompts]
        first, *others = prompts
        free = self.budget.due(len(prompts), self._running())
        free -= (own := min(first.left, (free + 1) // 2))
        turn = []
        for prompt in sorted(others, key=lambda prompt: prompt.left):
            if free > 0:
                turn.append((prompt, prompt.piece(free)))
                free -= len(turn[-1][1])
        return [(first, first.piece(own + free)), *turn]

    def _begin(self, begun: Sequence[tuple[int, GenerationRequest, int]], logits: torch.Tensor, state: State) -> None:
        """Begin the completions of each (row of logits (n, V) and state, request, number of places). Those for which
        there is no place wait, with the prompt already read."""
        slots, owners = list[Slot](), list[int]()
        for row, request, places in begun:
            slots += [Slot(request.speaker, list(request.tokens), one) for one in request.completions[:places]]
            owners += [row] * places
            if rest := request.completions[places:]:
                own = on_device([row], logits.device)
                prefix = CachedPrefix(len(request.tokens), logits[own], state.selected(own))
                self.waiting.appendleft(replace(request, completions=rest, prefix=prefix))
        rows, model = on_device(owners, logits.device), begun[0][1].speaker.model
        batch = ModelBatch(model, slots, logits[rows], state.selected(rows))
        if model in self.batches:
            self.batches[model].join(batch)
        else:
            self.batches[model] = batch

    def _deliver(self) -> None:
        """Hand the tokens sampled last to their listeners, and drop the sequences that end with them."""
        for batch in [*self.batches.values()]:
            staying = []
            for place, slot, token, logprobs in batch.results():
                end = DAMAGED if token is None else slot.take(token, logprobs)
                self.sampled += token is not None
                if not end:
                    staying.append(place)
                    continue
                read = slot.tokens if self.overlap else slot.tokens[:-1]
                if self.cache.limit and (self.overlap or slot.length > 1) and token is not None:
                    self.cache.add(slot.speaker, read, *batch.snapshot(place))
                self._end(slot.completion, end)
            if not staying:
                del self.batches[batch.model]
            elif len(staying) < len(batch.slots):
                batch.select(staying)
        if self.budget is not None and self.overlap:
            self.budget.end()
            self.budget.leave()
