"""The continuations of prompts as text, completed many at a time."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..data.tokenizer import Tokenizer
from .decode import generate
from .loading import Subject
from .prompts import WRITTEN
from .settings import Sampling
from .text import TextStream


class Continuation:
    """The continuation of one prompt: its row, the tokens and the text so far, and why it ended.

    end is "end" (of the document), "stop" or "length", "" before it ended. show, if given, is called with each piece of
    text.
    """

    def __init__(
        self,
        row: dict[str, Any],
        tokenizer: Tokenizer,
        stops: Iterable[str],
        show: Callable[[str], object] | None = None,
    ) -> None:
        self.row, self.show = row, show
        self.tokens: list[int] = []
        self.text, self.end = "", ""
        self._tokenizer, self._stream = tokenizer, TextStream(tokenizer, stops)
        self._lengths = [0]  # [n]: the length of the text after n tokens, withheld text included

    def feed(self, token: int) -> str:
        """Take a token -> a reason to end here, or ""."""
        self.tokens.append(token)
        if token == self._tokenizer.end_id:
            return "end"
        self._add(self._stream.feed(token))
        if self._stream.stopped:
            return "stop"
        self._lengths.append(len(self.text) + len(self._stream.held))
        return ""

    def finish(self, end: str) -> None:
        self._add(self._stream.finish())
        self.end = "stop" if self._stream.stopped else end

    def line(self) -> str:
        """The row and the fields of WRITTEN as a line of JSON."""
        found = dict(zip(WRITTEN, (self.text, len(self.tokens), self.end)))
        return json.dumps(self.row | found, ensure_ascii=False) + "\n"

    def shown_tokens(self) -> list[int]:
        """The tokens of the text, without a stop text or the end of the document after it. If a stop text began inside
        a token, the part of that token before it is encoded by itself."""
        if self.end != "stop":
            return self.tokens[: len(self._lengths) - 1]
        length = max(length for length in self._lengths if length <= len(self.text))
        return self.tokens[: self._lengths.index(length)] + self._tokenizer.encode(self.text[length:])

    def _add(self, text: str) -> None:
        self.text += text
        if self.show and text:
            self.show(text)


def complete(
    subject: Subject,
    prompts: Sequence[list[int]],
    continuations: Sequence[Continuation],
    sampling: Sampling,
    max_tokens: int,
    batch: int,
) -> Iterator[int]:
    """Continue prompts (lists of token ids), `batch` at a time, and feed each Continuation; yield the number of each as
    it ends: at one of its stops, at the end of the document, or after max_tokens."""
    model, start, tokenizer = subject

    def ends(number: int, token: int) -> str:
        return continuations[number].feed(token)

    for step in generate(model, prompts, sampling, max_tokens, ends, start, batch, tokenizer.vocab_size):
        if step.end:
            continuations[step.number].finish(step.end)
            yield step.number
    for number in range(len(prompts) if max_tokens == 0 else 0):
        continuations[number].finish("length")
        yield number
