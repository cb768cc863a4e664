"""Turn tokens into text as they come; characters and stop strings may cross the borders of tokens."""

import codecs
from collections.abc import Iterable, Sequence

from ..cli.errors import UserError
from ..data.tokenizer import REPLACEMENT, Tokenizer

LONGEST_CHARACTER = 4  # in tokens, because UTF-8 takes four bytes at most


class TextStream:
    """The text of one sequence, given out as soon as it is certain.

    A character is withheld until its last byte is there, and text that may be the start of a stop string until that is
    decided. `stopped` is True from the first stop string on; its text is not given out. A stop string that is a special
    token of the tokenizer, which has no text, stops at that token. Raises UserError for a stop string that contains
    such a token and more.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()) -> None:
        stops = tuple(stops)
        self.stops = tuple(stop for stop in stops if stop not in tokenizer.special)
        self._ends = {tokenizer.special[stop] for stop in stops if stop in tokenizer.special}
        for stop in self.stops:
            if inside := next((text for text in tokenizer.special if text in stop), None):
                raise UserError(
                    f"stop text {stop!r} holds {inside}, a token without text, and so would never occur; give only "
                    f"{inside}"
                )
        self.stopped = False
        self.held = ""  # the text withheld because it may be the start of a stop string
        self._decoder: ByteDecoder | TailDecoder = (
            ByteDecoder(tokenizer.token_bytes) if hasattr(tokenizer, "token_bytes") else TailDecoder(tokenizer)
        )

    def feed(self, token: int) -> str:
        """Take a token -> the text that is certain now, perhaps ""."""
        if token in self._ends and not self.stopped:
            text = self.finish()
            self.stopped = True
            return text
        return "" if self.stopped else self._release(self._decoder.feed(token))

    def finish(self) -> str:
        """End the sequence -> the text still withheld."""
        text = "" if self.stopped else self._release(self._decoder.finish())
        held, self.held = self.held, ""
        return text + held

    def _release(self, text: str) -> str:
        self.held += text
        found = [position for stop in self.stops if (position := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        certain = len(self.held) - max((overlap(self.held, stop) for stop in self.stops), default=0)
        text, self.held = self.held[:certain], self.held[certain:]
        return text


def overlap(text: str, stop: str) -> int:
    """Count the characters at the end of text that are the start of stop, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class ByteDecoder:
    """The decoder for vocabularies of bytes: table holds the bytes of each token, None for an unused one. Token 0 ends
    a document and has no text."""

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
    """The decoder for any tokenizer that decodes lists. It decodes the last tokens with and without the new ones,
    because a token's text may depend on the one before it, and may end one character and begin another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._before: list[int] = []  # tokens whose text was given out, kept as context
        self._new: list[int] = []  # tokens since then; the end of their text was not given out
        self._given = 0  # characters of the new tokens' text that were given out
        self._waiting = 0  # tokens since the last of those characters

    def feed(self, token: int) -> str:
        self._new.append(token)
        self._waiting += 1
        text = self._text()
        certain = text.rstrip(REPLACEMENT)
        if certain == text:
            if text or self._given:
                self._before = self._new
            self._new, self._given, self._waiting = [], 0, 0
            return text
        if self._waiting >= LONGEST_CHARACTER:
            certain = text[:-1]  # a character still open is broken by now, but the last one may have just begun
        if certain:
            self._given, self._waiting = self._given + len(certain), 1
        return certain

    def finish(self) -> str:
        text = self._text() if self._new else ""
        self._new, self._given = [], 0
        return text

    def _text(self) -> str:
        """The text of the new tokens that was not given out."""
        return self._decode(self._before + self._new)[len(self._decode(self._before)) + self._given :]
