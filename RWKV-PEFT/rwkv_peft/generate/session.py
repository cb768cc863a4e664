"""Read and continue one sequence in turns. A chat's memory is its State, so no token is read twice."""

import random
from collections.abc import Iterable, Iterator

import torch

from ..data.tokenizer import Tokenizer
from ..data.turns import TURN_END
from ..models.parts import LanguageModel
from ..models.state import State
from .decode import Sequence, check_finite, prefill
from .sampling import count, penalize, sample
from .settings import Sampling
from .text import TextStream


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
        logits, state = prefill(self.model, [asked], self.state)
        self.state, self.closed = state, False
        stream, shown, self.cut = TextStream(self.tokenizer, stops), "", False
        turn_end: tuple[str, State] | None = None  # the last text that ended in TURN_END, and the state after it
        row, size = Sequence(0, self.random), min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        counts = logits.new_zeros(1, size, dtype=torch.float32)
        for _ in range(max_tokens):
            check_finite(logits, [row], self.model)
            token = self._draw(logits[:, :size].float(), counts)
            row.length += 1
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
                    self.state, self.closed = turn_end[1], True  # without the words that open the next turn
                return
            new, state = self.model(torch.tensor([[token]], device=logits.device), self.state)
            logits, self.state, self.tail = new[:, 0], state, []
            if (whole := shown + stream.held).endswith(TURN_END):
                turn_end = whole, state
        else:
            self.cut = True
        rest = stream.finish()
        self.closed = (shown + rest).endswith(TURN_END)
        if rest:
            yield rest

    def _draw(self, logits: torch.Tensor, counts: torch.Tensor) -> int:
        """Draw the next token from logits (1, V) and update counts (1, V) of this answer's tokens."""
        if self.sampling.penalizes:
            logits = penalize(logits, counts, self.sampling)
        tokens = sample(logits, [self.random.random()], self.sampling)
        if self.sampling.penalizes:
            count(counts, tokens, self.sampling.penalty_decay)
        return int(tokens)
