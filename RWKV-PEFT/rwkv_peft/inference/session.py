"""Read and continue one sequence in turns. A chat's memory is its State, so no token is read twice."""

import random
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from ..data.tokenizer import Tokenizer
from ..data.turns import TURN_END
from ..models.parts import LanguageModel
from ..models.state import State
from .asked import Answer, Request
from .decode import Heard, Step, refuse_damaged
from .engine import Engine
from .reading import prefill
from .settings import Sampling
from .text import TextStream
from .voices import Voice


class Session:
    """A model's State after all turns so far, from `start` on (None: zeros).

    Between turns the sequence ends in TURN_END, as in the training data, or gets it before the next turn: `tail` holds
    tokens that were drawn but not read yet, and `closed` is True if the sequence with them ends in TURN_END. `cut` is
    True if the last answer used all of its max_tokens, so that it may be unfinished.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling, start: State | None = None
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.start = model, tokenizer, sampling, start
        self.random = random.Random(sampling.seed)
        self.reset()

    def reset(self) -> None:
        """Forget every turn."""
        self.state, self.closed = self.start, True
        self.tail: list[int] = []
        self.cut = False

    @property
    def begins(self) -> bool:
        """Tell whether nothing was said since the start."""
        return self.state is self.start

    def close(self) -> None:
        """Read the tokens that the last turn left and its TURN_END, so that the state includes them."""
        if not self.closed:
            self.tail += self.tokenizer.encode(TURN_END)
            self.closed = True
        if self.tail:
            self.state = prefill(self.model, [self.tail], self.state)[1]
            self.tail = []

    @torch.inference_mode()
    def answer(self, texts: Iterable[str], stops: Iterable[str], max_tokens: int) -> Iterator[str]:
        """Read texts, each tokenized by itself as the training data is, and yield the answer piece by piece.

        The answer ends before a stop text, at the token that ends a document, or after max_tokens. If the caller stops
        taking pieces, the sequence keeps the part that was drawn. Raises UserError if the logits are not finite.
        """
        self.close()
        asked = [token for text in texts for token in self.tokenizer.encode(text)]
        stream, shown, self.cut = TextStream(self.tokenizer, stops), "", False
        turn_end: tuple[str, State] | None = None  # the last text that ended in TURN_END, and the state after it
        whole_turn: State | None = None
        steps = deque[Step]()
        heard = Heard(0, steps, None, 0)
        engine = Engine(min(self.tokenizer.vocab_size, self.model.config.vocab_size), 1)
        answer = Answer(self.sampling, max_tokens + 1, heard, draws=self.random)
        engine.add(Request(Voice("", self.model, self.state), asked, [answer]))
        try:
            for _ in range(max_tokens):
                engine.step()
                if heard.damaged:
                    raise refuse_damaged(self.model, 0, heard.length)
                if (whole := shown + stream.held).endswith(TURN_END):
                    turn_end = whole, engine.groups[self.model].own(0)[1]
                token, self.tail = steps.pop().token, []
                if token == self.tokenizer.end_id:
                    break
                self.tail = [token]
                text = stream.feed(token)
                shown += text
                if text:
                    yield text
                if stream.stopped:
                    self.tail = []
                    if turn_end is not None and turn_end[0] == shown + TURN_END:
                        whole_turn = turn_end[1]  # without the words that open the next turn
                    return
            else:
                self.cut = True
        finally:
            if (group := engine.groups.get(self.model)) is not None:
                self.closed = whole_turn is not None
                self.state = group.own(0)[1] if whole_turn is None else whole_turn
                if not group.unread:  # an interrupt came after its reading
                    self.tail = []
        rest = stream.finish()
        self.closed = (shown + rest).endswith(TURN_END)
        if rest:
            yield rest
