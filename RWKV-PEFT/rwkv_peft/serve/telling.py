"""Tell answers as OpenAI does: whole, or in chunks as they are drawn."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..data.tokenizer import Tokenizer
from ..generate.engine import DAMAGED
from .worker import FAILED, Drawn, Piece

Told = dict[str, Any]
STOPS = ("end", "stop")  # every other end is a limit
BROKEN = (DAMAGED, FAILED)  # ends of answers that cannot be told


class Usage(NamedTuple):
    """Tokens of prompts, how many of them were known already, and tokens of answers."""

    prompt: int
    known: int
    answers: int

    def told(self) -> Told:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answers,
            "total_tokens": self.prompt + self.answers,
            "prompt_tokens_details": {"cached_tokens": self.known},
        }


class Teller:
    """The envelope around answers; how an answer itself is told, its subclasses say."""

    prefix, whole_kind, chunk_kind = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer, odds: bool) -> None:
        self.head = {"id": f"{self.prefix}{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.tokenizer, self.odds = tokenizer, odds

    def answer(self, piece: Piece) -> Told:
        """A whole answer."""
        raise NotImplementedError

    def part(self, piece: Piece, first: bool) -> Told:
        """A part of an answer; first: the first of its parts."""
        raise NotImplementedError

    def whole(self, answers: Sequence[Piece], usage: Usage) -> Told:
        choices = [self.answer(piece) for piece in answers]
        return {**self.head, "object": self.whole_kind, "choices": choices, "usage": usage.told()}

    def chunk(self, choices: Sequence[Told], usage: Usage | None = None) -> str:
        """A server-sent event."""
        told = {**self.head, "object": self.chunk_kind, "choices": list(choices)}
        return event(told | ({} if usage is None else {"usage": usage.told()}))

    def spelled(self, token: int) -> tuple[str, list[int]]:
        """A token's text and bytes; the text of one that is no whole characters is its bytes, spelled."""
        table: Sequence[bytes | None] | None = getattr(self.tokenizer, "token_bytes", None)
        if table is None:
            data = self.tokenizer.decode([token]).encode()
        else:
            data = (table[token] if token < len(table) else None) or b""
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


class ChatTeller(Teller):
    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def answer(self, piece: Piece) -> Told:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.number, "message": message, **self._rest(piece)}

    def part(self, piece: Piece, first: bool) -> Told:
        delta = {"role": "assistant"} if first else {}
        return {"index": piece.number, "delta": {**delta, "content": piece.text}, **self._rest(piece)}

    def _rest(self, piece: Piece) -> Told:
        odds = {"content": [self._odds(drawn) for drawn in piece.tokens], "refusal": None} if self.odds else None
        return {"logprobs": odds, "finish_reason": reason(piece.end)}

    def _odds(self, drawn: Drawn) -> Told:
        assert drawn.odds is not None
        top = [self._one(token, logprob) for token, logprob in drawn.odds.top]
        return {**self._one(drawn.token, drawn.odds.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> Told:
        text, data = self.spelled(token)
        return {"token": text, "logprob": logprob, "bytes": data}


class TextTeller(Teller):
    prefix, whole_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, odds: bool) -> None:
        super().__init__(model, tokenizer, odds)
        self.lengths: dict[int, int] = {}  # characters of each answer's tokens so far

    def answer(self, piece: Piece) -> Told:
        return {
            "index": piece.number,
            "text": piece.text,
            "logprobs": self._odds(piece) if self.odds else None,
            "finish_reason": reason(piece.end),
        }

    def part(self, piece: Piece, first: bool) -> Told:
        return self.answer(piece)

    def _odds(self, piece: Piece) -> Told:
        told: Told = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, odds in piece.tokens:
            text = self.spelled(token)[0]
            top = None if odds is None else {self.spelled(other)[0]: logprob for other, logprob in odds.top}
            before = self.lengths.get(piece.number, 0)
            self.lengths[piece.number] = before + len(text)
            for name, value in zip(told, (text, None if odds is None else odds.logprob, top, before)):
                told[name].append(value)
        return told


def reason(end: str) -> str | None:
    return ("stop" if end in STOPS else "length") if end else None


def event(told: Told) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"


def joined(pieces: Sequence[Piece]) -> Piece:
    """The pieces of one answer as one."""
    tokens = tuple(drawn for piece in pieces for drawn in piece.tokens)
    return Piece(pieces[0].number, "".join(piece.text for piece in pieces), tokens, pieces[-1].end)
