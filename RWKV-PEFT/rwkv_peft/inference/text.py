"""Incremental detokenization: text as the tokens come, though characters and stop strings may cross their borders."""

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..cli.errors import UserError
from ..data.tokenizer import REPLACEMENT, Tokenizer
from .prompts import WRITTEN

LONGEST_CHARACTER = 4  # in tokens, because UTF-8 takes four bytes at most


class TextStream:
    """The text of one sequence, released as soon as it is certain.

    A character is withheld until its last byte has come, and possible starts of a stop string until more text has.
    `stopped` is the first stop string, once it has come; it is not released. A stop string that is a special token of
    the tokenizer stops at that token, which has no text. Raises UserError for one that contains such a token and more.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()) -> None:
        stops = tuple(stops)
        self.stops = tuple(stop for stop in stops if stop not in tokenizer.special)
        self._ends = {tokenizer.special[stop]: stop for stop in stops if stop in tokenizer.special}
        for stop in self.stops:
            if inside := next((text for text in tokenizer.special if text in stop), None):
                raise UserError(
                    f"stop text {stop!r} holds {inside}, a token without text, and so would never occur; give only "
                    f"{inside}"
                )
        self.stopped = ""
        self.held = ""  # the withheld text, which may be the start of a stop string
        self._decoder: ByteDecoder | TailDecoder = (
            ByteDecoder(tokenizer.token_bytes) if hasattr(tokenizer, "token_bytes") else TailDecoder(tokenizer)
        )

    def feed(self, token: int) -> str:
        """Take a token -> the text that is certain now, perhaps ""."""
        if token in self._ends and not self.stopped:
            text = self.finish()
            self.stopped = self._ends[token]
            return text
        return "" if self.stopped else self._release(self._decoder.feed(token))

    def finish(self) -> str:
        """End the sequence -> the text still withheld."""
        text = "" if self.stopped else self._release(self._decoder.finish())
        held, self.held = self.held, ""
        return text + held

    def _release(self, text: str) -> str:
        self.held += text
        places = [(position, stop) for stop in self.stops if (position := self.held.find(stop)) >= 0]
        if places:
            position, self.stopped = min(places)
            text, self.held = self.held[:position], ""
            return text
        certain = len(self.held) - max((overlap(self.held, stop) for stop in self.stops), default=0)
        text, self.held = self.held[:certain], self.held[certain:]
        return text


class Continuation:
    """The continuation of one prompt: its row, and the tokens and text so far.

    end is "end" (of the document), "stop" (by the stop string `stopped`) or "length", "" before the end. show(text), if
    given, gets each piece of text as it is released.
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
        """Append a token -> a reason to end here, or ""."""
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

    @property
    def stopped(self) -> str:
        return self._stream.stopped

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


def overlap(text: str, stop: str) -> int:
    """The number of characters at the end of text that are the start of stop, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class ByteDecoder:
    """The decoder for vocabularies of bytes; table has the bytes of each token, None for an unused one. Token 0 ends a
    document and has no text."""

    def __init__(self, table: Sequence[bytes | None]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        if token == 0:
            return ""
        piece = self._table[token] if token < len(self._table) else None
        return self._utf8.decode(REPLACEMENT.encode() if piece is None else piece)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class TailDecoder:
    """The decoder for any tokenizer that decodes lists: it decodes the last tokens with and without the new ones.

    A token's text may depend on the one before it, and may end one character and begin another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._before: list[int] = []  # tokens with released text, as context
        self._new: list[int] = []  # tokens since then, with text still to release
        self._released = 0  # characters released of the new tokens' text
        self._waiting = 0  # tokens since the last of those characters

    def feed(self, token: int) -> str:
        self._new.append(token)
        self._waiting += 1
        text = self._text()
        certain = text.rstrip(REPLACEMENT)
        if certain == text:
            if text or self._released:
                self._before = self._new
            self._new, self._released, self._waiting = [], 0, 0
            return text
        if self._waiting >= LONGEST_CHARACTER:
            certain = text[:-1]  # a character still open is broken by now, but the last one may have just begun
        if certain:
            self._released, self._waiting = self._released + len(certain), 1
        return certain

    def finish(self) -> str:
        text = self._text() if self._new else ""
        self._new, self._released = [], 0
        return text

    def _text(self) -> str:
        """The text of the new tokens that is still to release."""
        return self._decode(self._before + self._new)[len(self._decode(self._before)) + self._released :]
