"""Tell answers as OpenAI does: whole, or in chunks as they are drawn."""

import codecs
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ...cli.streams import encoded
from ...data.tokenizer import Tokenizer
from ...data.tools import OPENS, Call, parse_calls
from ..rows import DAMAGED, LOST
from ..text import overlap
from .worker import FAILED, Drawn, Piece

Told = dict[str, Any]
UTF_8 = codecs.getincrementaldecoder("utf-8")
STOPS = ("end", "stop")  # every other end is a limit
OPENINGS = ("<tool_call>", "**Tool Call:**")  # of what OPENS finds
BROKEN = MappingProxyType(  # ends of answers that cannot be told, and what is told instead
    {
        DAMAGED: "the model's values are NaN or Inf; check its file and its adapter's",
        FAILED: "the model failed; see what the server has printed",
        LOST: "the schema became too costly to follow in the middle of the answer; make it simpler",
    }
)


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

    def part(self, piece: Piece, first: bool) -> Told | None:
        """A part of an answer, None if there is nothing to tell of it; first: the first of its parts."""
        raise NotImplementedError

    def is_news(self, piece: Piece) -> bool:
        return bool(piece.text or piece.end or (piece.tokens and self.odds))

    def whole(self, answers: Sequence[Piece], usage: Usage) -> Told:
        choices = [self.answer(piece) for piece in answers]
        return {**self.head, "object": self.whole_kind, "choices": choices, "usage": usage.told()}

    def chunk(self, choices: Sequence[Told], usage: Usage | None = None) -> bytes:
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
    """calls: the answers may call tools, which are told apart from their words."""

    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer, odds: bool, calls: bool) -> None:
        super().__init__(model, tokenizer, odds)
        self.calls = calls
        self.words: dict[int, Words] = {}

    def answer(self, piece: Piece) -> Told:
        text, calls = parse_calls(piece.text) if self.calls else (piece.text, [])
        message: Told = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls_told(calls)}
        return {"index": piece.number, "message": message, **self._rest(piece, bool(calls))}

    def part(self, piece: Piece, first: bool) -> Told | None:
        calls: list[Call] = []
        if self.calls:
            words = self.words.setdefault(piece.number, Words())
            piece = piece._replace(text=words.feed(piece.text))
            if piece.end:
                rest, calls = words.finish()
                piece = piece._replace(text=piece.text + rest)
        if not self.is_news(piece):
            return None
        delta: Told = ({"role": "assistant"} if first else {}) | {"content": piece.text}
        if calls:
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls_told(calls))]
        return {"index": piece.number, "delta": delta, **self._rest(piece, bool(calls))}

    def _rest(self, piece: Piece, calls: bool) -> Told:
        odds = {"content": [self._odds(drawn) for drawn in piece.tokens], "refusal": None} if self.odds else None
        end = reason(piece.end)
        return {"logprobs": odds, "finish_reason": "tool_calls" if calls and end == "stop" else end}

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
        self.lengths: dict[int, int] = defaultdict(int)  # whole characters of each answer's tokens so far
        self.decoders: dict[int, codecs.IncrementalDecoder] = defaultdict(lambda: UTF_8("replace"))

    def answer(self, piece: Piece) -> Told:
        return {
            "index": piece.number,
            "text": piece.text,
            "logprobs": self._odds(piece) if self.odds else None,
            "finish_reason": reason(piece.end),
        }

    def part(self, piece: Piece, first: bool) -> Told | None:
        return self.answer(piece) if self.is_news(piece) else None

    def _odds(self, piece: Piece) -> Told:
        told: Told = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, odds in piece.tokens:
            text, data = self.spelled(token)
            top = None if odds is None else {self.spelled(other)[0]: logprob for other, logprob in odds.top}
            before = self.lengths[piece.number]
            self.lengths[piece.number] += len(self.decoders[piece.number].decode(bytes(data)))
            for name, value in zip(told, (text, None if odds is None else odds.logprob, top, before)):
                told[name].append(value)
        return told


class Words:
    """The words of an answer that may call tools, as they come: what may be the opening of a call is held back."""

    def __init__(self) -> None:
        self.text, self.told = "", 0

    def feed(self, text: str) -> str:
        """-> the words that are certain now."""
        self.text += text
        found = OPENS.search(self.text, self.told)
        held = max(overlap(self.text, opening) for opening in OPENINGS)
        certain = max(found.start() if found else len(self.text) - held, self.told)
        new, self.told = self.text[self.told : certain], certain
        return new

    def finish(self) -> tuple[str, list[Call]]:
        """-> the words that were held back, and the calls."""
        words, calls = parse_calls(self.text)
        if not calls:
            return self.text[self.told :], []
        return words[len(self.text[: self.told].strip()) :], calls


def calls_told(calls: Sequence[Call]) -> list[Told]:
    functions = [{"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)} for call in calls]
    return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": each} for each in functions]


def reason(end: str) -> str | None:
    return ("stop" if end in STOPS else "length") if end else None


def event(told: Told) -> bytes:
    return encoded(f"data: {json.dumps(told, ensure_ascii=False)}\n\n")


def joined(pieces: Sequence[Piece]) -> Piece:
    """The pieces of one answer as one."""
    tokens = tuple(drawn for piece in pieces for drawn in piece.tokens)
    return Piece(pieces[0].number, "".join(piece.text for piece in pieces), tokens, pieces[-1].end)
